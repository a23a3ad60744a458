"""A tokenizer is trained reproducibly, on every format, and mistakes are named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import sentencepiece

from mf_train.data.tokenizer import Tokenizer
from mf_train.data.tokenizer_training import train_tokenizer
from mf_train.errors import UserError
from tests.data.texts import NASTY, json_lines, random_documents


def test_training_is_reproducible_and_reads_every_format(tmp_path: Path) -> None:
    documents = [text + "\n" for text in random_documents(60, seed=1)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(json_lines(documents[:30]))
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(documents[30:])))
    first = train_tokenizer([str(tmp_path / "in" / "*.jsonl*")], 320, tmp_path / "one")
    second = train_tokenizer([str(tmp_path / "in")], 320, tmp_path / "deep" / "two")
    assert first == tmp_path / "one" / "tokenizer.model"
    assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["tokenizer.model", "tokenizer_info.json"]
    info = json.loads((first.parent / "tokenizer_info.json").read_text())
    assert info["vocab_size"] == 320 and info["documents"] == 60
    assert info["bytes"] == sum(len(text.encode()) for text in documents)
    trained = Tokenizer(first.parent)
    assert (trained.vocab_size, trained.end_of_text_id) == (320, 0)
    assert trained.decode(trained.encode(NASTY)) == NASTY
    assert len(trained.encode(documents[1])) < len(documents[1].encode()) * 0.6  # it learned words


def test_training_draws_documents_when_there_is_too_much_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines([f"number {i} of the documents" for i in range(1000)]))
    train_tokenizer([str(tmp_path / "a.jsonl")], 290, tmp_path / "out", max_bytes=5000)
    info = json.loads((tmp_path / "out" / "tokenizer_info.json").read_text())
    assert 5000 <= info["bytes"] < 5100


def test_one_long_document_is_used_in_full(tmp_path: Path) -> None:
    """sentencepiece alone would drop a sentence longer than its limit."""
    (tmp_path / "a.txt").write_text("x" * 50_000 + " " + "zebra " * 20_000)
    pieces = Tokenizer(train_tokenizer([str(tmp_path / "a.txt")], 275, tmp_path / "out")).encode(" zebra")
    assert len(pieces) == 1


def test_shipped_tokenizer_is_what_its_readme_says(repository: Path, tmp_path: Path) -> None:
    shipped = Tokenizer(repository / "tokenizer")
    info = json.loads((repository / "tokenizer" / "tokenizer_info.json").read_text())
    assert shipped.vocab_size == info["vocab_size"] == 4096
    assert shipped.end_of_text_id == 0
    if sentencepiece.__version__ == info["sentencepiece"]:
        again = train_tokenizer([str(repository / "configs" / "quickstart-text" / "train")], 4096, tmp_path)
        assert again.read_bytes() == shipped.path.read_bytes()


def test_mistakes_are_named(tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("hello world\n" * 3)
    (tmp_path / "empty.txt").write_text("")
    few = str(tmp_path / "few.txt")
    cases = [
        (
            lambda: train_tokenizer([few], 4000, tmp_path / "o"),
            r"--vocab-size 4000: this text supports 2\d\d at",
        ),
        (
            lambda: train_tokenizer([few], 262, tmp_path / "o"),
            r"--vocab-size 262: the characters .* need 26\d",
        ),
        (lambda: train_tokenizer([few], 100, tmp_path / "o"), r"--vocab-size 100: .* need 259 or more"),
        (
            lambda: train_tokenizer([few], 2**31, tmp_path / "o"),
            r"--vocab-size 2147483648: .* most 2147483647",
        ),
        (
            lambda: train_tokenizer([str(tmp_path / "empty.txt")], 300, tmp_path / "o"),
            "--input: .*empty.txt holds no text",
        ),
        (
            lambda: train_tokenizer([str(tmp_path / "*.jsonl")], 300, tmp_path / "o"),
            r"--input: no file matches",
        ),
        (lambda: train_tokenizer([few], 270, few), r"--output .*few.txt: cannot be written"),
    ]
    for mistake, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            mistake()
        assert "\n" not in str(caught.value)
    for text in ("\n\n\n", "\u2581", "\u2585\n", "\0"):
        (tmp_path / "none.txt").write_text(text)
        with pytest.raises(UserError, match=r"--input .*none.txt: no text to train on: [^\n]*$"):
            train_tokenizer([str(tmp_path / "none.txt")], 300, tmp_path / "o")
    assert not (tmp_path / "o").exists()
