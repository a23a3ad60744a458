"""One source's text to its shards: parts prepared ahead, ranges tokenised in any order, shards written in order."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mf_train.config import OnError, SourceConfig
from mf_train.data.documents import TextDocuments, last_cut
from mf_train.data.files.input_files import InputFile
from mf_train.data.shards.shard import TokenShardWriter, WrittenShard
from mf_train.data.text.store import Part, parts_of
from mf_train.data.tokenize.worker import Encode, Encoded, Prepare, Workers, open_prepared
from mf_train.data.tokenizer import Tokenizer
from mf_train.progress import ProgressLine
from mf_train.text import time_left

TEXT_FOLDER = ".text"  # prepared parts, each for as long as it is needed
_RANGE_BYTES = 1 << 20  # of text, for one task: a little more, or a piece of a longer document
_RANGES_AHEAD = 4  # a worker
_SHARDS_FINISHING = 2
_LONGEST_WAIT = 0.5  # seconds until the progress is looked at again

Record = Callable[[dict[str, Any]], None]
Place = tuple[int, int]  # a part, and a document in it
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SourceWork:
    """A source of text, and what becomes of it."""

    key: str  # such as data.train[0]
    config: SourceConfig
    tokenizer: Tokenizer
    files: Sequence[InputFile]  # none for the hub
    inputs: str  # digest of what is read and how
    folder: Path  # of the shards; beside it is the text, in TEXT_FOLDER
    on_error: OnError
    dtype: str
    shard_bytes: int  # of text: a shard ends with the document that reaches it

    @property
    def name(self) -> str:
        return str(self.config.hub or self.config.path)


@dataclass(frozen=True, slots=True)
class _Range:
    """Neighbouring text of a part that is a worker's task, in the order of the source."""

    after: Place
    text_bytes: int
    ends_shard: bool
    encoded: Future[Encoded]


class ShardMaker:
    """Has `workers` do a source's work from shard number `first_shard` on, which begins at `first`.

    `record` gets {"part": i, "documents": n, "skipped": {file: n}, "reason": text} when a part's text is read, and
    {"shard": {...}, "after": place} when a shard is complete, in order. Memory: the tokens of a few ranges a worker,
    and a range is a piece of a document where that is long.
    """

    def __init__(
        self, work: SourceWork, workers: Workers, first_shard: int, first: Place, record: Record
    ) -> None:
        self._work = work
        self._parts: list[list[InputFile]] = parts_of(work.files) if work.files else [[]]
        self._first = first
        self._workers = workers
        self._record = record
        self._opened: dict[int, tuple[Part | SourceConfig, TextDocuments]] = {}
        self._ranges: deque[_Range] = deque()  # given out and not written
        self._cut_text = 0  # bytes of text of the shard's documents that are given out
        self._writer: TokenShardWriter | None = None
        self._shard = first_shard
        self._written_text = 0  # of the current shard
        self._finisher = ThreadPoolExecutor(1)
        self._finishing: deque[tuple[Future[WrittenShard], int, int, Place]] = deque()
        self._progress = _Progress(work.key, self._parts, first[0])

    def run(self) -> None:
        """Make the shards. Raises UserError, OSError, or TrainingError when a worker dies; no shard is half there."""
        try:
            for part in self._open_parts():
                for piece in self._cut(part):
                    self._write(_RANGES_AHEAD * self._workers.count - 1)
                    self._ranges.append(piece)
            self._write(0)
            if self._writer is not None:
                self._finish_shard((len(self._parts), 0))
            self._record_finished(0)
            self._remove_parts(len(self._parts))
        finally:
            if self._writer is not None:
                self._writer.abort()
            self._finisher.shutdown()
            self._progress.close()

    def _open_parts(self) -> Iterator[int]:
        """The parts that are not in shards yet, in order; those that come next are prepared meanwhile."""
        work = self._work
        if work.config.hub is not None:
            self._opened[0] = work.config, open_prepared(work.config, work.on_error, work.key)
            yield 0
            return
        preparing: deque[Future[Part]] = deque()
        ahead = 2 + self._workers.count // 16  # preparing text is some twenty times as fast as tokenising it
        for number in range(self._first[0], len(self._parts)):
            for files in self._parts[number + len(preparing) : number + ahead]:
                task = Prepare(
                    files, work.config.text_field, work.on_error, work.folder.with_name(TEXT_FOLDER)
                )
                preparing.append(self._workers.submit(task))
            part = self._wait(preparing.popleft())
            facts = {"documents": part.documents, "skipped": part.skipped, "reason": part.reason}
            self._record({"part": number, **facts})
            self._opened[number] = part, open_prepared(part, work.on_error, work.key)
            yield number

    def _cut(self, part: int) -> Iterator[_Range]:
        """The ranges of a part, each given out when it is asked for."""
        work, (text, documents) = self._work, self._opened[part]
        document, start = self._first[1] if part == self._first[0] else 0, 0
        while document < len(documents):
            begin, size = (document, start), 0
            while document < len(documents) and size < _RANGE_BYTES and self._cut_text < work.shard_bytes:
                left = documents.length(document) - start
                stop = start
                if left > _RANGE_BYTES:
                    stop = last_cut(documents, work.tokenizer, document, start, _RANGE_BYTES - size)
                if stop > start or (size and left > _RANGE_BYTES):  # the rest of it is the next ranges'
                    size += stop - start
                    start = stop
                    break
                size += left
                self._cut_text += start + left
                document, start = document + 1, 0
            ends_shard = self._cut_text >= work.shard_bytes
            if ends_shard:
                self._cut_text = 0
            task = Encode(text, work.key, work.on_error, begin, (document, start), work.dtype)
            yield _Range((part, document), size, ends_shard, self._workers.submit(task))

    def _wait(self, future: Future[T]) -> T:
        while not wait([future], _LONGEST_WAIT).done:
            self._progress.show_rate()
        return future.result()

    def _write(self, most_left: int) -> None:
        """Writes the ranges whose turn it is, until `most_left` are left."""
        while len(self._ranges) > most_left:
            written = self._ranges.popleft()
            encoded = self._wait(written.encoded)
            if self._writer is None:
                self._writer = TokenShardWriter(self._prefix(self._shard), self._work.dtype)
            self._writer.write(*encoded)
            self._written_text += written.text_bytes
            part, _ = written.after
            self._progress.tokens += len(encoded.tokens) // np.dtype(self._work.dtype).itemsize
            self._progress.advance(written.text_bytes, part, self._opened[part][1].num_bytes)
            self._progress.show_rate()
            if written.ends_shard:
                self._finish_shard(written.after)
            self._record_finished(_SHARDS_FINISHING)
            self._remove_parts(part)

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

    def __init__(self, key: str, parts: Sequence[list[InputFile]], first_part: int) -> None:
        super().__init__(sys.stderr)
        self.tokens = 0
        self._key = key
        self._sizes = [sum(max(0, file.size) for file in part) for part in parts]
        self._text_bytes = 0
        self._started = time.monotonic()
        self._next = self._started + (0.5 if self.terminal else 10)
        self._input = self._first_input = float(sum(self._sizes[:first_part]))

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
            line += f", {self._input / total:.0%}, {time_left(left)} left"
        self.show(line)
