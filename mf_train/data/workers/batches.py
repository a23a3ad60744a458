"""A rank's batches, made ahead of time by worker processes or by a thread."""

from __future__ import annotations

import queue
import threading
import time

import numpy as np

from mf_train.config import Config
from mf_train.data.stream.mixture import Mixture
from mf_train.data.stream.stream import Position, State, Tokens, TokenStream, stream_worker
from mf_train.data.workers.worker import Change, Job, Worker

_MOMENT = 1.0  # seconds that a thread gets to end


class BatchReader:
    """Makes a stream's next batches in `data.workers` processes, at most one a logical stream; with 0, in a thread.

    `depth` batches are held ready, and what fits into the workers' pipes: about four times as much, at most 1 MiB each.
    `positions()` and `documents()` are those after the batches given out, so that a checkpoint holds what was trained
    on and not what was read ahead. The stream, which was opened by this configuration, tells where to begin; it must
    not be used elsewhere until `close()`.
    """

    def __init__(self, stream: TokenStream, config: Config, depth: int = 2) -> None:
        assert depth >= 1
        self._stream = stream
        self._data = config.data
        self._step = stream.step
        self._positions = {int(number): list(of) for number, of in stream.positions().items()}
        self._documents = [
            sum(positions[source].documents for positions in self._positions.values())
            for source in range(len(stream.sources))
        ]
        self._replaced: list[Change] = []  # positions as they were before the last batch
        self._failure: BaseException | None = None
        self._maker: _Workers | _Thread
        self._maker = _Workers(stream, config, depth) if self._data.workers else _Thread(stream, depth)

    def next_batch(self) -> Tokens:
        """This rank's rows, int32 [G / R, S + 1].

        Raises what reading them raised (UserError, OSError), here and at every later call; OSError when they are
        not there after `data.timeout_seconds`, or when a worker process died.
        """
        if self._failure is None:
            try:
                return self._next_batch()
            except BaseException as error:
                self._failure = error
        raise self._failure

    def positions(self, *, before_last: bool = False) -> dict[str, list[Position]]:
        """The rank's part of the state's `streams` after the batches given out so far, or before the last of them."""
        copy = {number: list(positions) for number, positions in self._positions.items()}
        if before_last:
            for number, source, position in reversed(self._replaced):
                copy[number][source] = position
        return {str(number): positions for number, positions in copy.items()}

    def documents(self) -> list[int]:
        """Of each source, how many documents the rank's streams have read to their ends so far, epochs added up."""
        return list(self._documents)

    def close(self) -> None:
        """Stop, and drop batches made ahead. No process is left; a thread that hangs in a read is, until exit."""
        self._maker.close()

    def _next_batch(self) -> Tokens:
        stream = self._stream
        first, modulus = self._step * stream.global_batch_size, self._data.logical_streams
        numbers = [(first + row) % modulus for row in stream.row_numbers]
        try:
            batch, changes = self._maker.next_batch(numbers, self._data.timeout_seconds)
        except _LateError as late:
            raise self._timeout(numbers, late.changes) from None
        self._replaced.clear()
        for number, source, position in changes:
            positions = self._positions[number]
            before = positions[source]
            self._replaced.append((number, source, before))
            self._documents[source] += position.documents - before.documents
            positions[source] = position
        self._step += 1
        return batch

    def _timeout(self, numbers: list[int], changes: list[Change]) -> OSError:
        """The error about the row after `changes`, whose source follows from the rows before it."""
        data, number = self._data, numbers[len(changes)]
        rows = [position.rows for position in self._positions[number]]
        for stream, source, position in changes:
            if stream == number:
                rows[source] = position.rows
        mixture = Mixture([source.weight for source in data.train])
        source = mixture.next_source(
            [a + b for a, b in zip(mixture.starting_counts(number), rows, strict=True)]
        )
        return OSError(
            f"no batch for {data.timeout_seconds} s: {self._maker.reader_of(number)} is still reading "
            f"data.train[{source}] ({self._stream.sources[source].name}) for logical stream {number}: look at what "
            "holds it up, or raise data.timeout_seconds"
        )


class _LateError(Exception):
    """The time is over; `changes` are those of the batch's rows that are there."""

    def __init__(self, changes: list[Change]) -> None:
        self.changes = changes


class _Thread:
    """Batches that a thread makes."""

    def __init__(self, stream: TokenStream, depth: int) -> None:
        self._stream = stream
        self._making: list[Change] = []  # of the batch that the thread is busy with
        self._ready: queue.Queue[tuple[Tokens, list[Change]] | BaseException] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="token-prefetch", daemon=True)
        self._thread.start()

    def next_batch(self, numbers: list[int], seconds: float) -> tuple[Tokens, list[Change]]:
        """A batch, whose rows are of the streams `numbers`, and what each row changes; raises _LateError."""
        assert not self._stop.is_set(), "the reader is closed"
        try:
            item = self._ready.get(timeout=seconds)
        except queue.Empty:
            raise _LateError(list(self._making)) from None
        if isinstance(item, BaseException):
            raise item
        return item

    def reader_of(self, number: int) -> str:
        return "the trainer's thread"

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_MOMENT)

    def _produce(self) -> None:
        try:
            while not self._stop.is_set():
                batch = _empty_batch(self._stream)
                self._making = changes = []
                for tokens in batch:
                    number, source = self._stream.fill(tokens)
                    changes.append((number, source, self._stream.position(number, source)))
                self._put((batch, changes))
        except BaseException as error:  # handed to the consumer, whatever it is
            self._put(error)

    def _put(self, item: tuple[Tokens, list[Change]] | BaseException) -> None:
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


class _Workers:
    """Batches put together from the rows of worker processes; used as `_Thread`."""

    def __init__(self, stream: TokenStream, config: Config, depth: int) -> None:
        self._stream = stream
        self._ranks = stream.row_numbers.step
        self._workers: list[Worker] = []
        count = min(config.data.workers, config.data.logical_streams // self._ranks)
        state = stream.state_dict()
        try:
            for number in range(count):
                self._workers.append(Worker(self._job(config, number, count, state, depth)))
        except BaseException:
            self.close()
            raise

    def next_batch(self, numbers: list[int], seconds: float) -> tuple[Tokens, list[Change]]:
        deadline = time.monotonic() + seconds
        changes: list[Change] = []
        batch = _empty_batch(self._stream)
        rows = batch.data.cast("B")
        size = batch[0].nbytes
        try:
            for row, number in enumerate(numbers):
                change = self._worker_of(number).read(rows[row * size : (row + 1) * size], deadline)
                assert change[0] == number
                changes.append(change)
        except TimeoutError:
            raise _LateError(changes) from None
        return batch, changes

    def reader_of(self, number: int) -> str:
        worker = self._worker_of(number)
        return f"{worker.name} (process {worker.process.pid})"

    def close(self) -> None:
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.close()

    def _worker_of(self, number: int) -> Worker:
        return self._workers[stream_worker(number, self._ranks, len(self._workers))]

    def _job(self, config: Config, number: int, count: int, state: State, depth: int) -> Job:
        stream = self._stream
        own = {
            key: of
            for key, of in state["streams"].items()
            if stream_worker(int(key), self._ranks, count) == number
        }
        return Job(
            config=config,
            tokenizer=stream.tokenizer,
            sources=stream.sources,
            data_rank=stream.row_numbers.start,
            data_size=self._ranks,
            worker=number,
            workers=count,
            state={**state, "streams": own},
            rows_ahead=-(-depth * len(stream.row_numbers) // count),
        )


def _empty_batch(stream: TokenStream) -> Tokens:
    return np.empty((len(stream.row_numbers), stream.sequence_length + 1), np.int32)
