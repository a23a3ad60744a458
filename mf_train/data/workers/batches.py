"""A rank's batches, made ahead of time by worker processes or by a thread.

A worker process gets its job by standard input and writes messages to a pipe: a header of nine int64 (kind, stream,
source, the six numbers of the position) and the int32 tokens of a row. The pipe is the queue, so there is nothing to
clean up: when the trainer goes, however it goes, standard input closes and the process ends.
"""

from __future__ import annotations

import os
import pickle
import queue
import select
import signal
import struct
import sys
import threading
import time
from typing import NamedTuple

import numpy as np

from mf_train.config import Config
from mf_train.data.documents import Source, Tokens
from mf_train.data.stream.order import Mixture
from mf_train.data.stream.stream import Position, State, TokenStream, stream_worker
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.workers.child import (
    OTHER_ERROR,
    Child,
    Messages,
    describe_error,
    end_with_the_parent,
    error_of,
)

Change = tuple[int, int, Position]  # of a stream in a source: what a row does to the state

_HEADER = struct.Struct("=9q")
_ROW = 0  # kind of message. The text of an error takes the place of the tokens; its length that of the stream
_PIPED = 4  # times the rows that a worker holds ready may wait in the pipe as well
_MOMENT = 1.0  # seconds that a thread or a process gets to end by itself


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
        """The rows that this rank reads, int32 [rows, S + 1].

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
        numbers = [(first + row) % modulus for row in stream.row_numbers(self._step)]
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
        step = self._stream.step
        try:
            while not self._stop.is_set():
                batch = _empty_batch(self._stream, len(self._stream.row_numbers(step)))
                self._making = changes = []
                for tokens in batch:
                    number, source = self._stream.fill(tokens)
                    changes.append((number, source, self._stream.position(number, source)))
                self._put((batch, changes))
                step += 1
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
        self._ranks = stream.data_size
        self._workers: list[_Worker] = []
        count = min(config.data.workers, stream.num_streams)
        state = stream.state_dict()
        try:
            for number in range(count):
                self._workers.append(_Worker(self._job(config, number, count, state, depth)))
        except BaseException:
            self.close()
            raise

    def next_batch(self, numbers: list[int], seconds: float) -> tuple[Tokens, list[Change]]:
        deadline = time.monotonic() + seconds
        changes: list[Change] = []
        batch = _empty_batch(self._stream, len(numbers))
        rows = batch.data.cast("B") if numbers else memoryview(b"")
        size = batch.itemsize * batch.shape[1]
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

    def _worker_of(self, number: int) -> _Worker:
        return self._workers[stream_worker(number, self._ranks, len(self._workers))]

    def _job(self, config: Config, number: int, count: int, state: State, depth: int) -> _Job:
        stream = self._stream
        rows_a_step = -(-stream.global_batch_size * stream.num_streams // config.data.logical_streams)
        own = {
            key: of
            for key, of in state["streams"].items()
            if stream_worker(int(key), self._ranks, count) == number
        }
        return _Job(
            config=config,
            tokenizer=stream.tokenizer,
            sources=stream.sources,
            data_rank=stream.data_rank,
            data_size=self._ranks,
            worker=number,
            workers=count,
            state={**state, "streams": own},
            rows_ahead=-(-depth * rows_a_step // count),
        )


def _empty_batch(stream: TokenStream, rows: int) -> Tokens:
    return np.empty((rows, stream.sequence_length + 1), np.int32)


# Worker processes ----------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """What a worker makes: the rows of some of the rank's streams, from a state on."""

    config: Config
    tokenizer: Tokenizer
    sources: list[Source]  # as the trainer opened them: nothing is listed or looked up again
    data_rank: int
    data_size: int
    worker: int
    workers: int
    state: State
    rows_ahead: int  # that it holds ready, beside those in the pipe


class _Worker:
    """A running worker process, seen from the trainer. Its sources have been prepared: it only opens them."""

    def __init__(self, job: _Job) -> None:
        self.name = f"data worker {job.worker} of data-parallel rank {job.data_rank}"
        row_bytes = _HEADER.size + 4 * (job.config.model.sequence_length + 1)
        self._child = Child(__name__, _PIPED * job.rows_ahead * row_bytes)
        self.process = self._child.process
        self._rows = self._child.answers.fileno()
        os.set_blocking(self._rows, False)
        self._poll = select.poll()
        self._poll.register(self._rows, select.POLLIN)
        self._header = memoryview(bytearray(_HEADER.size))
        self._child.send(job)

    def read(self, row: memoryview, deadline: float) -> Change:
        """Fills `row` (bytes) with the tokens of the worker's next row.

        Raises what reading raised there, OSError when the worker died, and TimeoutError when time.monotonic()
        passes `deadline`.
        """
        wanted = _HEADER.size + len(row)
        try:
            got = os.readv(self._rows, (self._header, row))
        except BlockingIOError:
            got = 0
        if got < wanted:
            self._fill([self._header[got:], row[max(0, got - _HEADER.size) :]], deadline)
        kind, stream, source, *position = _HEADER.unpack(self._header)
        if kind != _ROW:
            raise self._failure(kind, row, stream, deadline)
        return stream, source, Position._make(position)

    def hang_up(self) -> None:
        """Tell the process to end."""
        self._child.hang_up()

    def close(self) -> None:
        """End the process: one that does not notice within a moment is killed."""
        self._child.close(_MOMENT)

    def _fill(self, buffers: list[memoryview], deadline: float) -> None:
        """Fills all buffers, waiting for what is not there yet."""
        while buffers := [buffer for buffer in buffers if buffer]:
            try:
                got = os.readv(self._rows, buffers)
            except BlockingIOError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError from None
                self._poll.poll(1000 * min(left, 1000.0))
                continue
            if not got:
                raise self._death()
            for index, buffer in enumerate(buffers):
                buffers[index] = buffer[got:]
                got = max(0, got - len(buffer))

    def _failure(self, kind: int, row: memoryview, length: int, deadline: float) -> Exception:
        rest = bytearray(max(0, length - len(row)))
        self._fill([memoryview(rest)], deadline)
        text = (bytes(row) + rest)[:length].decode("utf-8")
        return error_of(kind, f"{self.name} failed:\n{text}" if kind == OTHER_ERROR else text)

    def _death(self) -> OSError:
        status = self._child.end(_MOMENT)
        if status == -signal.SIGKILL:
            return OSError(
                f"{self.name} was killed (exit status {status}), as the kernel does when memory runs out: give the "
                "job more memory, or set fewer data.workers"
            )
        return OSError(f"{self.name} ended with exit status {status}: standard error may say why")


def main(rows: int) -> None:
    """The worker process: rows into the pipe `rows` without end, until the trainer closes one or reading fails."""
    job: _Job = pickle.load(sys.stdin.buffer)
    end_with_the_parent()
    messages = Messages(rows, job.rows_ahead)
    try:
        stream = _open_stream(job)
        stream.load_state_dict(job.state)
        _give_rows(stream, messages)
    except BaseException as error:
        kind, text = describe_error(error)
    utf8 = text.encode("utf-8", "replace")
    header = _HEADER.pack(kind, len(utf8), *[0] * 7)
    messages.put(header, utf8.ljust(4 * (job.config.model.sequence_length + 1)))
    messages.finish()


def _open_stream(job: _Job) -> TokenStream:
    config = job.config
    return TokenStream(
        config.data,
        job.tokenizer,
        config.model.sequence_length,
        config.training.global_batch_size,
        job.data_rank,
        job.data_size,
        job.worker,
        job.workers,
        job.sources,
    )


def _give_rows(stream: TokenStream, messages: Messages) -> None:
    """Puts the stream's rows, without end."""
    while True:
        number, source, position, tokens = stream.next_row()
        messages.put(_HEADER.pack(_ROW, number, source, *position), tokens.data.cast("B"))
