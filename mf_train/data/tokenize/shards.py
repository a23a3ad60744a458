"""One source's text to its shards: parts prepared ahead, ranges tokenised in any order, shards written in order."""

from __future__ import annotations

import pickle
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.config import OnError, SourceConfig
from mf_train.data.documents import TextDocuments
from mf_train.data.files.input_files import InputFile
from mf_train.data.shards.shard import TokenShardWriter, WrittenShard
from mf_train.data.text.store import Part
from mf_train.data.tokenize.worker import TOKENS, Encode, Prepare, TokenizeWorker, open_prepared
from mf_train.progress import ProgressLine

_RANGE_BYTES = 1 << 20  # of text, for one task
_HELD_BYTES = 8 << 20  # of tokens of one task that is ahead of its turn
_RANGES_AHEAD = 4  # a worker
_SHARDS_FINISHING = 2

Record = Callable[[dict[str, Any]], None]
Place = tuple[int, int]  # a part, and a document in it


@dataclass(frozen=True, slots=True)
class Work:
    """What becomes of one source."""

    key: str  # such as data.train[0]
    source: SourceConfig
    parts: Sequence[list[InputFile]]  # one empty one for the hub
    on_error: OnError
    dtype: str
    folder: Path  # of the shards
    text_folder: Path  # of the text, for as long as it is needed
    shard_bytes: int  # of text: a shard ends with the document that reaches it
    first_shard: int
    first: Place  # where the first shard begins


@dataclass(slots=True)
class _Range:
    """Consecutive documents of a part that are a worker's task, in the order of the source."""

    documents: int
    text_bytes: int
    ends_shard: bool
    after: Place
    frames: list[bytes] = field(default_factory=list)
    held: int = 0  # bytes in them
    lengths: npt.NDArray[np.int64] | None = None  # when it is done


class ShardMaker:
    """Runs a source's work on `workers`.

    `record` gets {"part": i, "documents": n, "skipped": {file: n}, "reason": text} when a part's text is read, and
    {"shard": {...}, "after": place} when a shard is complete, in order. Memory: a few ranges a worker, however long
    a document is.
    """

    def __init__(self, work: Work, workers: Sequence[TokenizeWorker], record: Record) -> None:
        self._work = work
        self._workers = workers
        self._record = record
        self._ahead = 1 + len(workers) // 16  # preparing text is some twenty times as fast as tokenising it
        self._opened: dict[int, tuple[Part | SourceConfig, TextDocuments]] = {}
        self._unprepared = work.first[0]  # the next part to prepare
        self._part, self._document = work.first  # where the next range begins
        self._shard_text = 0  # bytes of text of the shard's ranges so far
        self._ranges: deque[_Range] = deque()  # given out and not written
        self._tasks: dict[TokenizeWorker, int | _Range] = {}
        self._writer: TokenShardWriter | None = None
        self._shard = work.first_shard
        self._written_text = 0  # of the current shard
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: deque[tuple[Future[WrittenShard], int, int, Place]] = deque()
        self._progress = _Progress(work)

    def run(self) -> None:
        """Make the shards. Raises UserError, OSError, or TrainingError when a worker dies; no shard is half there."""
        if self._work.source.hub is not None:
            self._opened[0] = (
                self._work.source,
                open_prepared(self._work.source, self._work.on_error, self._work.key),
            )
            self._unprepared = 1
        try:
            while True:
                self._give_tasks()
                if not self._tasks:
                    break
                self._receive_some()
                self._record_finished(_SHARDS_FINISHING)
                self._progress.show_rate()
            if self._writer is not None:
                self._finish_shard((self._part, self._document))
            self._record_finished(0)
            self._remove_parts(len(self._work.parts))
        finally:
            if self._writer is not None:
                self._writer.abort()
            self._finisher.shutdown()
            self._progress.close()

    def _give_tasks(self) -> None:
        for worker in self._workers:
            if worker in self._tasks:
                continue
            if self._unprepared < len(self._work.parts) and self._unprepared <= self._part + self._ahead:
                files = self._work.parts[self._unprepared]
                task = Prepare(
                    files, self._work.source.text_field, self._work.on_error, self._work.text_folder
                )
                self._tasks[worker] = self._unprepared
                self._unprepared += 1
                worker.start(task)
            elif (found := self._cut()) is not None:
                self._tasks[worker] = found[0]
                self._ranges.append(found[0])
                worker.start(found[1])

    def _cut(self) -> tuple[_Range, Encode] | None:
        """The next range, if its text is there and not too many are under way."""
        if len(self._ranges) >= _RANGES_AHEAD * len(self._workers):
            return None
        while self._part in self._opened and self._document == len(self._opened[self._part][1]):
            self._part, self._document = self._part + 1, 0
        if self._part not in self._opened:
            return None
        text, documents = self._opened[self._part]
        first, size = self._document, 0
        while (
            self._document < len(documents)
            and size < _RANGE_BYTES
            and self._shard_text < self._work.shard_bytes
        ):
            length = documents.length(self._document)
            size += length
            self._shard_text += length
            self._document += 1
        ends_shard = self._shard_text >= self._work.shard_bytes
        if ends_shard:
            self._shard_text = 0
        work = self._work
        task = Encode(text, work.key, work.on_error, first, self._document, work.dtype)
        return _Range(self._document - first, size, ends_shard, (self._part, self._document)), task

    def _waits(self, worker: TokenizeWorker) -> bool:
        """Whether the worker shall wait for its turn with more tokens than the command wants to hold."""
        task = self._tasks[worker]
        return isinstance(task, _Range) and task.held > _HELD_BYTES and task is not self._ranges[0]

    def _receive_some(self) -> None:
        """A frame of every worker that has one, or nothing after half a second."""
        workers = {worker.fileno(): worker for worker in self._tasks if not self._waits(worker)}
        ready = select.poll()
        for file in workers:
            ready.register(file, select.POLLIN)
        for file, _ in ready.poll(500):
            self._receive(workers[file])

    def _receive(self, worker: TokenizeWorker) -> None:
        kind, content = worker.read()
        task = self._tasks[worker]
        if kind == TOKENS:
            assert isinstance(task, _Range)
            task.frames.append(content)
            task.held += len(content)
        else:
            del self._tasks[worker]
            if isinstance(task, _Range):
                task.lengths = np.frombuffer(content, np.int64)
            else:
                self._open_part(task, pickle.loads(content))
        self._write()

    def _open_part(self, number: int, part: Part) -> None:
        facts = {"documents": part.documents, "skipped": part.skipped, "reason": part.reason}
        self._record({"part": number, **facts})
        self._opened[number] = (part, open_prepared(part, self._work.on_error, self._work.key))

    def _write(self) -> None:
        """Writes what has its turn."""
        while self._ranges:
            turn = self._ranges[0]
            if self._writer is None:
                self._writer = TokenShardWriter(self._prefix(self._shard), self._work.dtype)
            for frame in turn.frames:
                self._writer.write(frame)
            self._progress.tokens += turn.held // np.dtype(self._work.dtype).itemsize
            turn.frames, turn.held = [], 0
            if turn.lengths is None:
                return
            self._writer.end_documents(turn.lengths)
            self._written_text += turn.text_bytes
            self._progress.advance(turn.text_bytes, turn.after[0], self._opened[turn.after[0]][1].num_bytes)
            self._ranges.popleft()
            if turn.ends_shard:
                self._finish_shard(turn.after)
            self._remove_parts(turn.after[0])

    def _remove_parts(self, before: int) -> None:
        for number in [number for number in self._opened if number < before]:
            text, _ = self._opened.pop(number)
            if isinstance(text, Part):
                text.remove()

    def _prefix(self, shard: int) -> Path:
        return self._work.folder / f"{shard:06}"

    def _finish_shard(self, after: Place) -> None:
        """Apart, because it waits for the disk."""
        assert self._writer is not None
        future = self._finisher.submit(_finish, self._writer)
        self._finishing.append((future, self._shard, self._written_text, after))
        self._writer, self._written_text = None, 0
        self._shard += 1

    def _record_finished(self, most_left: int) -> None:
        while self._finishing and (len(self._finishing) > most_left or self._finishing[0][0].done()):
            future, shard, text_bytes, after = self._finishing.popleft()
            facts = {"name": self._prefix(shard).name, "text_bytes": text_bytes, **asdict(future.result())}
            self._record({"shard": facts, "after": after})


def _finish(writer: TokenShardWriter) -> WrittenShard:
    with writer:
        return writer.finish()


class _Progress(ProgressLine):
    """One line that changes on a terminal, and otherwise a line every ten seconds."""

    def __init__(self, work: Work) -> None:
        super().__init__(sys.stderr)
        self.tokens = 0
        self._key = work.key
        self._sizes = [sum(max(0, file.size) for file in part) for part in work.parts]
        self._text_bytes = 0
        self._started = time.monotonic()
        self._next = self._started + (0.5 if self.terminal else 10)
        self._input = self._first_input = float(sum(self._sizes[: work.first[0]]))

    def advance(self, text_bytes: int, part: int, part_text_bytes: int) -> None:
        """So much more of a part's text is written."""
        self._text_bytes += text_bytes
        self._input += self._sizes[part] * text_bytes / part_text_bytes

    def show_rate(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (0.5 if self.terminal else 10)
        seconds = now - self._started
        line = (
            f"{self._key}: {self._text_bytes / 1e6:,.0f} MB of text, {self.tokens / 1e6:,.1f} M tokens, "
            f"{self._text_bytes / 1e6 / seconds:,.1f} MB/s"
        )
        if self._input > self._first_input:  # sizes are known, which a server need not say
            total = sum(self._sizes)
            left = seconds * (total - self._input) / (self._input - self._first_input)
            line += f", {self._input / total:.0%}, {left / 60:,.0f} minutes left"
        self.show(line)
