"""A process that makes rows of the token stream, and the trainer's end of the pipe to it.

The process gets its settings by standard input and writes messages to a pipe: a header of nine int64 (kind, stream,
source, the six numbers of the position) and the int32 tokens of a row. The pipe is the queue, so there is nothing to
clean up: when the trainer goes, however it goes, standard input closes and the process ends.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import struct
import sys
import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from mf_train.config import Config
from mf_train.data.documents import Source
from mf_train.data.stream.stream import Position, State, TokenStream
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.workers.child import OTHER_ERROR, Child, describe_error, end_with_the_parent, error_of

Change = tuple[int, int, Position]  # of a stream in a source: what a row does to the state

_HEADER = struct.Struct("=9q")
_ROW = 0  # kind of message. The text of an error takes the place of the tokens; its length that of the stream
_PIPED = 4  # times the rows that a worker holds ready may wait in the pipe as well
_MOMENT = 1.0  # seconds that a process gets to end by itself


class Job(NamedTuple):
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


class Worker:
    """A running worker process, seen from the trainer. Its sources have been prepared: it only opens them."""

    def __init__(self, job: Job) -> None:
        self.name = f"data worker {job.worker} of data-parallel rank {job.data_rank}"
        row_bytes = _HEADER.size + 4 * (job.config.model.sequence_length + 1)
        self._child = Child(__name__, _PIPED * job.rows_ahead * row_bytes)
        self.process = self._child.process
        self._rows = self._child.output
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
    job: Job = pickle.load(sys.stdin.buffer)
    end_with_the_parent()
    messages = _Messages(rows, job.rows_ahead)
    try:
        stream = _open_stream(job)
        stream.load_state_dict(job.state)
        give_rows(stream, messages)
    except BaseException as error:
        kind, text = describe_error(error)
    utf8 = text.encode("utf-8", "replace")
    header = _HEADER.pack(kind, len(utf8), *[0] * 7)
    messages.put(header, utf8.ljust(4 * (job.config.model.sequence_length + 1)))
    messages.finish()


def _open_stream(job: Job) -> TokenStream:
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


def give_rows(stream: TokenStream, messages: _Messages) -> None:
    """Puts the stream's rows, without end."""
    while True:
        number, source, position, tokens = stream.next_row()
        messages.put(_HEADER.pack(_ROW, number, source, *position), tokens.data.cast("B"))


class _Messages:
    """Messages on their way into the pipe, and those that wait in front of it. A closed pipe ends the process."""

    def __init__(self, pipe: int, ahead: int) -> None:
        self._pipe = pipe
        self._most = 2 * ahead
        self._waiting: deque[memoryview] = deque()
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLOUT)
        os.set_blocking(pipe, False)

    def put(self, header: bytes, body: bytes | memoryview) -> None:
        """Sends a message, or holds it back; waits while more than `ahead` messages are held back."""
        self._waiting += (memoryview(header), memoryview(body))
        self._send(self._most)

    def finish(self) -> None:
        """Waits until everything is sent."""
        self._send(0)

    def _send(self, most: int) -> None:
        while self._waiting:
            try:
                sent = os.writev(self._pipe, list(islice(self._waiting, 16)))
            except BlockingIOError:
                if len(self._waiting) <= most:
                    return
                self._poll.poll()
                continue
            except BrokenPipeError:
                os._exit(0)
            while sent:
                part = self._waiting.popleft()
                if sent < len(part):
                    self._waiting.appendleft(part[sent:])
                    break
                sent -= len(part)
