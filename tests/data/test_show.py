"""What `memoryformer data inspect` shows of sources and of a step's batch."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_train.cli import main
from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainingConfig
from mf_train.data.show import inspect_data
from mf_train.data.stream.digest import batch_digest
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.texts import random_documents, write_json_lines


def test_inspect(tmp_path: Path, tokenizer: Tokenizer) -> None:
    parts = [random_documents(9, seed=1), [*random_documents(4, seed=2), "long " * 9000]]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").touch()
    first = SourceConfig(path=write_json_lines(tmp_path / "0.jsonl", parts[0]))
    write_json_lines(tmp_path / "folder" / "1.jsonl", parts[1])
    second = SourceConfig(path=str(tmp_path / "folder"))
    config = Config(
        model=ModelConfig(vocab_size=4096, sequence_length=32),
        data=DataConfig(train=(first, second), validation=(second,)),
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
        training=TrainingConfig(global_batch_size=4),
    )
    stream = TokenStream(config.data, tokenizer, 32, 4)
    batches = [stream.next_batch() for _ in range(3)]
    state = TokenStream(config.data, tokenizer, 32, 4).state_dict()
    lines = list(inspect_data(config, step=3))
    assert list(inspect_data(config, 3, (0, state))) == lines
    assert list(inspect_data(config, 3, (2, {**state, "identity": "of another stream", "step": 2}))) == lines
    shown = "\n".join(lines)
    assert "4096 ids, end of text 0" in lines[0]
    documents = [text for text in random_documents(9, seed=1) if text]
    assert f"train[0] {first.path}: 1 files, {len(documents)} documents" in lines[1]
    assert "(50.0% of the rows)" in lines[1]
    tokens, size = sum(len(tokenizer.encode(text)) for text in documents), len("".join(documents).encode())
    assert f"{size:,} bytes, about {tokens:,} tokens, {size / tokens:.2f} bytes a token, " in lines[1]
    assert f"document 0: {documents[0][:30]!r}"[:-1] in lines[2]
    assert f"validation[0] {second.path}" in shown
    assert f"  1 files of formats that are not read: {second.path}/notes.md" in lines
    assert f"batch of step 3: 4 rows of 33 tokens (32 predicted), digest {batch_digest(batches[2])}" in shown
    text = "<|endoftext|>".join("".join(tokenizer.decode([t])) if t else "" for t in batches[2][0].tolist())
    assert text.replace("<|endoftext|>", "")[:5] in shown
    with pytest.raises(UserError, match=r"model\.vocab_size is 100"):
        list(inspect_data(Config(model=ModelConfig(vocab_size=100), tokenizer=config.tokenizer)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--documents", "5"], "--documents does not go with a step's batch, without --page"),
        (["--page", "page.html", "--step", "1"], "--step does not go with --page"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_option_that_would_do_nothing_is_refused(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["data", "inspect", "no-such.yaml", *options])
    assert end.value.code == 2 and words in capsys.readouterr().err
