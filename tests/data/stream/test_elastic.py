"""Ranks as real processes, each with its worker: any number of them, before and after restarts, gives the same rows."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainingConfig
from mf_train.config.loading import config_to_tree
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.stream.stream import TokenStream, merge_states
from mf_train.data.tokenizer import Tokenizer
from tests.data.stream.reference import reference_documents
from tests.data.texts import json_lines, random_documents, write_json_lines

SEQUENCE, BATCH, STREAMS = 32, 16, 16

RANK = """
import json, sys
import numpy as np
from mf_train.config.loading import parse_config
from mf_train.data.workers.batches import BatchReader
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer
job = json.load(sys.stdin)
config = parse_config(job["config"], "job")
stream = TokenStream(config.data, Tokenizer(config.tokenizer.path), config.model.sequence_length,
                     config.training.global_batch_size, job["rank"], job["size"])
if job["state"]:
    stream.load_state_dict(job["state"])
reader = BatchReader(stream, config)
rows = [reader.next_batch() for _ in range(job["steps"])]
np.save(job["output"], np.stack(rows))
print(json.dumps(reader.positions()))
reader.close()
"""


def run_ranks(
    repository: Path, folder: Path, job: dict[str, Any], size: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Global batches [steps, G, S + 1] that `size` processes read, and the positions after them."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            cwd=repository,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(size)
    ]
    for rank, process in enumerate(processes):
        assert process.stdin is not None
        settings = {**job, "rank": rank, "size": size, "output": str(folder / f"{rank}.npy")}
        process.stdin.write(json.dumps(settings).encode())
        process.stdin.close()
        process.stdin = None
    rows = np.zeros((job["steps"], BATCH, SEQUENCE + 1), np.int32)
    positions: dict[str, Any] = {}
    for rank, process in enumerate(processes):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and not err, err.decode()
        rows[:, rank::size] = np.load(folder / f"{rank}.npy")
        positions |= json.loads(out)
    return rows, positions


@pytest.fixture(scope="module")
def texts() -> list[list[str]]:
    return [random_documents(300, 1, 30), random_documents(200, 2, 60), random_documents(40, 3, 20)]


@pytest.fixture(scope="module")
def config(texts: list[list[str]], tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Config:
    """JSON lines in two files, one of them compressed; token shards; one file of JSON lines."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "0").mkdir()
    (folder / "0" / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(texts[0][:100])))
    write_json_lines(folder / "0" / "b.jsonl", texts[0][100:])
    for number, part in enumerate((texts[1][:150], texts[1][150:])):
        writer = TokenShardWriter(folder / f"1-{number}", "uint16")
        for text in filter(None, part):
            writer.add([*tokenizer.encode(text), tokenizer.end_of_text_id])
        writer.finish()
    write_json_lines(folder / "2.jsonl", texts[2])
    paths = [(folder / "0", 3.0), (folder / "1-*.bin", 2.0), (folder / "2.jsonl", 0.7)]
    sources = tuple(SourceConfig(path=str(path), weight=weight) for path, weight in paths)
    return Config(
        model=ModelConfig(vocab_size=4096, sequence_length=SEQUENCE),
        data=DataConfig(train=sources, seed=11, logical_streams=STREAMS, block_documents=4, window_blocks=3),
        tokenizer=TokenizerConfig(path=str(tokenizer.path)),
        training=TrainingConfig(global_batch_size=BATCH),
    )


@pytest.mark.parametrize("sizes", [pytest.param((1, 2, 4, 8), marks=pytest.mark.slow), (8, 1, 4, 2)])
def test_every_document_of_an_epoch_once_across_restarts(
    sizes: tuple[int, ...],
    config: Config,
    texts: list[list[str]],
    repository: Path,
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    whole = TokenStream(config.data, tokenizer, SEQUENCE, BATCH)
    identity = whole.identity()
    steps, state, batches = 18, None, []
    for size in sizes:
        job = {"config": config_to_tree(config), "state": state, "steps": steps}
        rows, positions = run_ranks(repository, tmp_path, job, size)
        batches.append(rows)
        step = steps * len(batches)
        state = merge_states([{"step": step, "identity": identity, "streams": positions}])
    given_out = np.concatenate(batches)
    rows_of: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    for step in range(len(given_out)):
        for row in range(BATCH):
            expected = whole.next_row()
            np.testing.assert_array_equal(given_out[step, row], expected.tokens, f"step {step}, row {row}")
            rows_of[expected.stream, expected.source].append(given_out[step, row])
    assert state is not None and state["streams"] == json.loads(json.dumps(whole.positions()))
    for source, documents in enumerate(texts):
        check_documents(config.data, source, documents, rows_of, tokenizer)


def check_documents(
    data: DataConfig,
    source: int,
    documents: list[str],
    rows_of: dict[tuple[int, int], list[np.ndarray]],
    tokenizer: Tokenizer,
) -> None:
    """The streams' rows, joined, are the documents in their order: none is lost, doubled or cut."""
    full = [text for text in documents if text]
    seen: dict[str, int] = defaultdict(int)
    for stream in range(STREAMS):
        tokens: list[int] = []
        for row in rows_of[stream, source]:
            assert not tokens or tokens[-1] == row[0]  # rows overlap by one token
            tokens += row[1:].tolist() if tokens else row.tolist()
        text = "".join(
            "\0" if token == tokenizer.end_of_text_id else chr(0x100000 + token) for token in tokens
        )
        pieces = text.split("\0")[:-1]
        order = reference_documents(data, source, stream, full)
        for piece, document in zip(pieces, islice(order, len(pieces)), strict=True):
            assert [ord(c) - 0x100000 for c in piece] == tokenizer.encode(document)
            seen[document] += 1
    assert len(seen) > 0.9 * len(full)  # the test covers about an epoch or more of every source
