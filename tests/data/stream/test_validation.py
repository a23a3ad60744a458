"""Validation blocks predict every token once; the shipped text."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mf_train.config import DataConfig, SourceConfig, ValidationConfig
from mf_train.data.sources import open_text
from mf_train.data.stream.validation import (
    IGNORED,
    ValidationBlocks,
    deal_blocks,
    set_tokens,
    validation_tokens,
)
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from tests.data.texts import random_documents, write_json_lines


@pytest.fixture
def sources(tmp_path: Path) -> tuple[list[SourceConfig], list[str]]:
    documents = [random_documents(9, seed=1), [*random_documents(4, seed=2), "long " * 9000]]
    paths = [write_json_lines(tmp_path / f"{i}.jsonl", part) for i, part in enumerate(documents)]
    return [SourceConfig(path=path) for path in paths], [text for part in documents for text in part]


def expected_tokens(texts: list[str], tokenizer: Tokenizer) -> list[int]:
    return [t for text in texts if text for t in [*tokenizer.encode(text), tokenizer.end_of_text_id]]


def validation_blocks(
    sources: list[SourceConfig], tokenizer: Tokenizer, sequence_length: int, limit: int = 0, key: str = "k"
) -> ValidationBlocks:
    tokens = validation_tokens(sources, DataConfig(), tokenizer, sequence_length, limit, key)
    return ValidationBlocks(tokens, tokenizer, sequence_length)


@pytest.mark.parametrize("sequence_length", [1, 7, 64, 10**6])
def test_every_token_but_the_first_is_predicted_once(
    sequence_length: int, sources: tuple[list[SourceConfig], list[str]], tokenizer: Tokenizer
) -> None:
    blocks = validation_blocks(sources[0], tokenizer, sequence_length)
    tokens = expected_tokens(sources[1], tokenizer)
    inputs, targets = (
        np.concatenate(part) for part in zip(*[blocks[i] for i in range(len(blocks))], strict=True)
    )
    assert inputs.dtype == targets.dtype == np.int64
    assert len(inputs) == len(blocks) * sequence_length
    assert (targets != IGNORED).sum() == blocks.num_tokens == len(tokens) - 1
    assert targets[: blocks.num_tokens].tolist() == tokens[1:]
    assert inputs[: blocks.num_tokens].tolist() == tokens[:-1]
    assert set(inputs[blocks.num_tokens :].tolist()) <= {tokenizer.end_of_text_id}
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_bytes_and_entropy(sources: tuple[list[SourceConfig], list[str]], tokenizer: Tokenizer) -> None:
    blocks = validation_blocks(sources[0], tokenizer, 16)
    tokens = expected_tokens(sources[1], tokenizer)
    first = len(tokenizer.decode(tokens[:1]).encode())
    assert blocks.num_bytes == sum(len(text.encode()) for text in sources[1]) - first
    counts = Counter(tokens[1:])
    entropy = -math.fsum(c / (len(tokens) - 1) * math.log(c / (len(tokens) - 1)) for c in counts.values())
    assert blocks.unigram_entropy() == pytest.approx(entropy, rel=1e-12)


def test_limit(sources: tuple[list[SourceConfig], list[str]], tokenizer: Tokenizer) -> None:
    everything = validation_blocks(sources[0], tokenizer, 16)
    some = validation_blocks(sources[0], tokenizer, 16, limit=5)
    assert len(some) == 5 and some.num_tokens == 80
    for i in range(5):
        np.testing.assert_array_equal(some[i], everything[i])
    assert some.num_bytes == tokenizer.token_bytes[some.tokens_t[1:]].sum()
    assert len(validation_blocks(sources[0], tokenizer, 16, limit=10**6)) == len(everything)


def test_every_set_gets_its_share(
    sources: tuple[list[SourceConfig], list[str]], tokenizer: Tokenizer
) -> None:
    assert deal_blocks(7, [0.3]) == [7] and deal_blocks(0, [1, 2]) == [0, 0]
    assert deal_blocks(3, [1000, 1, 1]) == [1, 1, 1] and deal_blocks(10**9 + 2, [1, 3]) == [
        25 * 10**7 + 1,
        75 * 10**7 + 1,
    ]
    sets = tuple(
        ValidationConfig(path=each.path, weight=weight)
        for each, weight in zip(sources[0], (1, 3), strict=True)
    )
    tokens = list(set_tokens(DataConfig(validation=sets), tokenizer, 16, 6))
    for each, found, share in zip(sources[0], tokens, (2, 4), strict=True):
        np.testing.assert_array_equal(found, validation_tokens([each], DataConfig(), tokenizer, 16, share))
    missing = DataConfig(validation=(sets[0], ValidationConfig(path="none.txt")))
    with pytest.raises(UserError, match=r"data.validation\[1\]: none.txt does not exist"):
        list(set_tokens(missing, tokenizer, 16, 2))


def test_no_text_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(UserError, match=r"--data\[0\]: .*a.jsonl holds no text"):
        validation_blocks([SourceConfig(path=path)], tokenizer, 16, key="--data")
    with pytest.raises(UserError, match=r"k\[0\]: .* does not exist"):
        validation_blocks([SourceConfig(path=path + "x")], tokenizer, 16)


def test_shipped_text(repository: Path) -> None:
    folder = repository / "configs" / "quickstart-text"
    train = open_text(SourceConfig(path=str(folder / "train")), "k", DataConfig())
    validation = open_text(SourceConfig(path=str(folder / "validation")), "k", DataConfig())
    assert (len(train), len(validation)) == (242, 7)
    assert not {train.text(i) for i in range(242)} & {validation.text(i) for i in range(7)}
    assert sum(path.stat().st_size for path in folder.rglob("*.gz")) < 5_000_000
