"""Random configurations: every number of ranks, restarts at any step and both roads give the reference's batches."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.stream.stream import TokenStream, merge_states
from mf_train.data.tokenizer import Tokenizer
from tests.data.stream.reference import reference_batches
from tests.data.texts import random_documents, write_json_lines


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[] if seed < 15 else [pytest.mark.slow]) for seed in range(60)]
)
def test_random_configurations(seed: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    run_case(random.Random(seed), tmp_path, tokenizer)


@pytest.mark.slow
def test_a_thousand_random_configurations(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for seed in range(1000, 2000):
        run_case(random.Random(seed), tmp_path / str(seed), tokenizer)


def run_case(case: random.Random, folder: Path, tokenizer: Tokenizer) -> None:
    """A random configuration, read by a random number of ranks that changes at random steps."""
    texts = [random_source(case) for _ in range(case.randint(1, 4))]
    streams = case.choice([1, 2, 3, 4, 6, 8, 12, 24])
    batch = case.choice([1, 2, 3, 5, 8, 13, 24])
    numbers_of_ranks = [1, 2, 3, 4, 5, 7, 12, 30]
    sequence_length = case.choice([1, 5, 17, 64, 300])
    data = DataConfig(
        train=tuple(
            SourceConfig(
                path=write_source(case, folder / f"{index}", documents, tokenizer),
                weight=case.choice([1.0, 0.1, 2.5, 7.0, 0.003]),
            )
            for index, documents in enumerate(texts)
        ),
        seed=case.randrange(2**40),
        logical_streams=streams,
        block_documents=case.choice([1, 2, 3, 64]),
        window_blocks=case.choice([1, 2, 5, 16]),
    )
    expected = reference_batches(data, texts, tokenizer, sequence_length, batch)

    def start(number: int) -> list[TokenStream]:
        return [TokenStream(data, tokenizer, sequence_length, batch, rank, number) for rank in range(number)]

    ranks = start(case.choice(numbers_of_ranks))
    for step in range(case.randint(3, 25)):
        if case.random() < 0.3:
            state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
            assert state["step"] == step
            ranks = start(case.choice(numbers_of_ranks))
            for rank in ranks:
                rank.load_state_dict(state)
        rows = np.zeros((batch, sequence_length + 1), np.int32)
        for rank in ranks:
            numbers = rank.row_numbers()
            rows[numbers] = rank.next_batch()
        np.testing.assert_array_equal(rows, next(expected), f"{data}, S {sequence_length}, step {step}")


def random_source(case: random.Random) -> list[str]:
    documents = random_documents(
        case.choice([1, 2, 9, 40, 150]), case.randrange(10**6), case.choice([0, 3, 40, 400])
    )
    if case.random() < 0.2:
        documents.append("no spaces " + "x" * 20_000)  # longer than a segment
    return documents if any(documents) else ["a"]


def write_source(case: random.Random, place: Path, documents: list[str], tokenizer: Tokenizer) -> str:
    """The documents as JSON lines or as token shards, in one to three files."""
    cuts = sorted(case.randint(0, len(documents)) for _ in range(case.randint(0, 2)))
    parts = [documents[a:b] for a, b in zip([0, *cuts], [*cuts, len(documents)], strict=True)]
    place.mkdir(parents=True)
    if case.random() < 0.5:
        for number, part in enumerate(parts):
            write_json_lines(place / f"{number}.jsonl", part)
        return str(place)
    dtype, ends = case.choice(["uint16", "int32", "int64"]), case.random() < 0.5
    for number, part in enumerate(parts):
        writer = TokenShardWriter(place / f"{number}", dtype)
        for text in filter(None, part):
            writer.add([*tokenizer.encode(text), *([tokenizer.end_of_text_id] if ends else [])])
        writer.finish()
    return str(place)
