"""The page on sources: lengths, duplicates inside a source and across two, tokens a byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, ValidationConfig
from mf_train.data.sources import open_source
from mf_train.data.survey import shared_documents, survey, write_survey
from mf_train.data.tokenize.command import tokenize
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.texts import random_documents, write_json_lines


@pytest.fixture
def config(tmp_path: Path, tokenizer: Tokenizer) -> Config:
    texts = [text for text in random_documents(40, seed=3) if text]
    train = write_json_lines(tmp_path / "train.jsonl", [*texts, *texts[:3], texts[0]])
    held_out = write_json_lines(tmp_path / "held-out.jsonl", [*texts[5:7], "of its own", texts[5] + " "])
    return Config(
        model=ModelConfig(vocab_size=4096),
        data=DataConfig(train=(SourceConfig(path=train),), validation=(ValidationConfig(path=held_out),)),
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
    )


def test_what_is_counted(config: Config, tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [text for text in random_documents(40, seed=3) if text]
    list(tokenize(config, tmp_path / "shards", 1))
    sources = [*config.data.train, *config.data.validation]
    shards = [SourceConfig(path=str(tmp_path / "shards" / name)) for name in ("train-0", "validation-0")]
    found = [
        survey(str(number), open_source(each, "k", config.data, tokenizer), tokenizer, 10**6)
        for number, each in enumerate((*sources, *shards))
    ]
    assert [each.repeated for each in found] == [4, 0, 4, 0]
    assert shared_documents(found) == [("1", "0", 2), ("3", "2", 2)]
    assert found[0].lengths[: len(texts)].tolist() == [len(text.encode()) for text in texts]
    assert found[2].lengths[: len(texts)].tolist() == [len(tokenizer.encode(text)) for text in texts]
    ratios = [len(tokenizer.encode(text)) / len(text.encode()) for text in texts]
    np.testing.assert_allclose(found[0].tokens_a_byte[: len(texts)], ratios)
    few = survey("few", open_source(sources[0], "k", config.data, tokenizer), tokenizer, 7)
    spread = [number * found[0].documents // 7 for number in range(7)]
    assert few.lengths.tolist() == found[0].lengths[spread].tolist()


def test_the_page(config: Config, tmp_path: Path) -> None:
    (line,) = write_survey(config, tmp_path / "data.html", 100)
    page = (tmp_path / "data.html").read_text()
    assert line.startswith(f"{tmp_path}/data.html: ") and "of 2 sources" in line
    assert "<b>2</b> documents of validation[0] are also in train[0]" in page
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 2 and "http" not in page
    for output, documents, message in (
        (tmp_path, 5, "name a file"),
        (tmp_path / "no" / "data.html", 5, "in a folder that is there"),
        (tmp_path / "data.html", 0, "--documents 0: at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            list(write_survey(config, output, documents))
