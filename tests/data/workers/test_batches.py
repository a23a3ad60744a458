"""Batches made ahead are those of the stream, their positions too, and what goes wrong is raised where it belongs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainingConfig
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.stream.stream import Position, State, TokenStream
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.workers.batches import BatchReader
from mf_train.errors import TrainingError, UserError
from tests.data.texts import random_documents, write_json_lines

SEQUENCE, BATCH, STREAMS, VOCABULARY = 23, 12, 8, 4096
Open = Callable[..., BatchReader]


@pytest.fixture(scope="module")
def config(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Three sources: texts, token shards and a single document."""
    folder = tmp_path_factory.mktemp("prefetch")
    paths = [
        write_json_lines(folder / "0.jsonl", [*random_documents(60, seed=1), "word " * 7000]),
        write_shard(folder / "1", [range(3, 4 + n) for n in range(50)]),
        write_json_lines(folder / "2.jsonl", ["only one"]),
    ]
    sources = [SourceConfig(path=p, weight=w) for p, w in zip(paths, (0.6, 0.3, 0.1), strict=True)]
    return Config(
        model=ModelConfig(sequence_length=SEQUENCE, vocab_size=VOCABULARY),
        data=DataConfig(train=tuple(sources), seed=5, logical_streams=STREAMS, timeout_seconds=60),
        tokenizer=TokenizerConfig(path=str(repository / "tokenizer")),
        training=TrainingConfig(global_batch_size=BATCH),
    )


def write_shard(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    with TokenShardWriter(prefix, "uint16") as writer:
        for tokens in documents:
            writer.add([*tokens, 0])
        writer.finish()
    return f"{prefix}.bin"


def with_data(config: Config, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, **changes))


def open_stream(config: Config, tokenizer: Tokenizer, rank: int = 0, ranks: int = 1) -> TokenStream:
    sizes = config.model.sequence_length, config.training.global_batch_size
    return TokenStream(config.data, tokenizer, *sizes, rank, ranks)


@pytest.fixture
def open_reader(tokenizer: Tokenizer) -> Iterator[Open]:
    """`open_reader(config, stream=None, depth=2)`: a reader that is closed in the end; nothing is left of it."""
    opened: list[BatchReader] = []

    def open_one(config: Config, stream: TokenStream | None = None, depth: int = 2) -> BatchReader:
        opened.append(BatchReader(stream or open_stream(config, tokenizer), config, depth))
        return opened[-1]

    yield open_one
    for reader in opened:
        reader.close()
        reader.close()  # a second time does nothing
        assert all(not os.path.exists(f"/proc/{process}") for process in processes(reader))


def processes(reader: BatchReader) -> list[int]:
    """Process numbers of the reader's workers."""
    return [worker.process.pid for worker in getattr(reader._maker, "_workers", [])]


def through_json(positions: dict[str, list[Position]]) -> State:
    state: State = json.loads(json.dumps(positions))
    return state


@pytest.mark.parametrize(
    ("workers", "rank", "ranks"), [(0, 0, 1), (1, 0, 1), (0, 1, 2), (2, 1, 2), (3, 0, 1), (40, 3, 4)]
)
def test_batches_and_positions_are_the_streams(
    config: Config, tokenizer: Tokenizer, open_reader: Open, workers: int, rank: int, ranks: int
) -> None:
    config = with_data(config, workers=workers)
    plain = open_stream(config, tokenizer, rank, ranks)
    reader = open_reader(config, open_stream(config, tokenizer, rank, ranks), depth=1 + workers % 2)
    assert len(processes(reader)) == min(workers, STREAMS // ranks)
    for _ in range(30):
        before = plain.positions()
        batch = reader.next_batch()
        assert batch.dtype == np.int32
        np.testing.assert_array_equal(batch, plain.next_batch())
        after = plain.positions()
        assert reader.positions() == after
        assert reader.positions(before_last=True) == before
        assert reader.documents() == [sum(p[source].documents for p in after.values()) for source in range(3)]
    assert min(reader.documents()) > 0


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_reader_goes_on_from_the_streams_state(
    config: Config, tokenizer: Tokenizer, open_reader: Open, workers: int
) -> None:
    """The state of one reader's positions, loaded by a stream of another number of ranks with other workers."""
    reader = open_reader(with_data(config, workers=2 - workers))
    plain = open_stream(config, tokenizer)
    for _ in range(7):
        reader.next_batch(), plain.next_batch()
    state = {"step": 7, "identity": plain.identity(), "streams": through_json(reader.positions())}
    half = open_stream(config, tokenizer, 1, 2)
    half.load_state_dict(state)
    later = open_reader(with_data(config, workers=workers), half)
    assert sum(later.documents()) > 0
    for _ in range(5):
        np.testing.assert_array_equal(later.next_batch(), plain.next_batch()[1::2])
    assert reader.documents() == [sum(p[s].documents for p in reader.positions().values()) for s in range(3)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_an_error_is_raised_at_its_batch_and_after(
    config: Config, tokenizer: Tokenizer, open_reader: Open, workers: int, tmp_path: Path
) -> None:
    """A token shard with one id that is outside the vocabulary, and a path longer than a row."""
    folder = tmp_path / ("long" * 50)
    folder.mkdir()
    documents = [[5] * 400 for _ in range(40)]
    documents[17][3] = 5000
    source = SourceConfig(path=write_shard(folder / "a", documents))
    config = with_data(config, train=(source,), workers=workers)
    plain, reader = open_stream(config, tokenizer), open_reader(config)
    for _ in range(1000):
        before = through_json(reader.positions())
        try:
            expected = plain.next_batch()
        except UserError as error:
            wanted = str(error)
            break
        np.testing.assert_array_equal(reader.next_batch(), expected)
    assert "5000" in wanted and str(folder) in wanted
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            reader.next_batch()
        assert str(caught.value) == wanted
    assert through_json(reader.positions()) == before


def test_an_error_of_the_machine_stays_one(
    config: Config, tokenizer: Tokenizer, open_reader: Open, tmp_path: Path
) -> None:
    """The worker finds a folder where the index was."""
    config = with_data(config, train=(SourceConfig(path=write_shard(tmp_path / "a", [[5] * 100])),))
    stream = open_stream(config, tokenizer)
    stream.identity()
    (tmp_path / "a.idx").unlink()
    (tmp_path / "a.idx").mkdir()
    reader = open_reader(config, stream)
    for _ in range(2):
        with pytest.raises(OSError, match=r"Is a directory.*a\.idx"):
            reader.next_batch()


def test_an_unexpected_exception_comes_with_its_traceback(
    config: Config, tokenizer: Tokenizer, open_reader: Open
) -> None:
    reader = open_reader(with_data(config, window_blocks="x"), open_stream(config, tokenizer))
    with pytest.raises(
        TrainingError, match=r"(?s)data worker 0 of data-parallel rank 0.*Traceback.*TypeError"
    ):
        reader.next_batch()


def test_a_worker_that_hangs_is_named_and_ended(config: Config, open_reader: Open) -> None:
    reader = open_reader(with_data(config, workers=2))
    reader.next_batch()
    reader._data = replace(config.data, timeout_seconds=1)
    stopped = processes(reader)[1]
    os.kill(stopped, signal.SIGSTOP)
    with pytest.raises(OSError) as caught:
        for _ in range(100_000):
            reader.next_batch()
    message = str(caught.value)
    assert message.startswith("no batch for 1 s: data worker 1 of data-parallel rank 0 ")
    assert f"(process {stopped})" in message and "data.timeout_seconds" in message
    with pytest.raises(OSError) as again:
        reader.next_batch()
    assert again.value is caught.value


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_late_row_is_named_by_its_source(
    config: Config, tokenizer: Tokenizer, open_reader: Open, workers: int
) -> None:
    """No time at all: the reader, which has begun before, is late at whichever row it reads by then."""
    config = with_data(config, workers=workers, timeout_seconds=0)
    large = replace(config, model=replace(config.model, sequence_length=5000))
    reader = open_reader(large, open_stream(large, tokenizer))
    sources = r"(0\] \(.*0\.jsonl|1\] \(.*1\.bin|2\] \(.*2\.jsonl)\)"
    with pytest.raises(OSError, match=r"no batch for 0 s: .* is still reading data\.train\[" + sources):
        reader.next_batch()


@pytest.mark.parametrize(("number", "message"), [(9, "was killed.*memory"), (6, "ended with exit status -6")])
def test_a_worker_that_dies_is_an_error(config: Config, open_reader: Open, number: int, message: str) -> None:
    reader = open_reader(with_data(config, workers=2))
    reader.next_batch()
    os.kill(processes(reader)[1], number)
    with pytest.raises(OSError, match=f"data worker 1 of data-parallel rank 0 {message}"):
        for _ in range(100_000):
            reader.next_batch()


def test_a_worker_that_dies_before_its_first_row(config: Config, open_reader: Open) -> None:
    reader = open_reader(config)
    os.kill(processes(reader)[0], signal.SIGKILL)
    with pytest.raises(OSError, match="was killed"):
        reader.next_batch()


def test_an_interrupt_of_the_trainer_can_still_close(config: Config, open_reader: Open) -> None:
    """Ctrl-C while the trainer waits for a row."""
    reader = open_reader(with_data(config, timeout_seconds=30))
    reader.next_batch()
    os.kill(processes(reader)[0], signal.SIGSTOP)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100_000):
            reader.next_batch()
