"""Text of any files as plain UTF-8 with the ends of its documents, in the cache: random access by pread."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from mf_train.config import OnError
from mf_train.data.documents import TextDocuments
from mf_train.data.files.access import OpenFiles, read_exactly, with_retries
from mf_train.data.files.cache import (
    cache_errors,
    cache_folder,
    do_each_once,
    open_temporary,
    temporary_name,
    try_lock,
)
from mf_train.data.files.input_files import InputFile
from mf_train.data.text.readers import read_documents
from mf_train.errors import UserError
from mf_train.files import publish, sync
from mf_train.progress import ProgressLine

_READER_VERSION = 3  # raise it when the same files give other documents: old caches are then not used
_PART_BYTES = 64 << 20  # of input
_ENDS_AT_ONCE = 1 << 16
_BLOCK = 64  # neighbouring documents whose ends are read together
_BLOCKS_KEPT = 2048
_OPEN_FILES = 64


@dataclass(frozen=True)
class Part:
    """Prepared documents of some neighbouring files of a source: `path` with .text, .ends (int64) and .meta."""

    path: Path
    documents: int
    num_bytes: int
    skipped: dict[str, int] = field(default_factory=dict)  # what was left out of each file
    reason: str | None = None  # of the first that was

    @property
    def text(self) -> str:
        return f"{self.path}.text"

    @property
    def ends(self) -> str:
        return f"{self.path}.ends"

    def remove(self) -> None:
        """Deletes its files, the completion marker first."""
        for suffix in (".meta", ".ends", ".text", ".lock"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)


class StoredDocuments(TextDocuments):
    """The documents of one source in order, read with pread. Used from one thread."""

    def __init__(self, name: str, parts: Sequence[Part], files: int) -> None:
        self.name = name
        self.files = files
        self.num_bytes = sum(part.num_bytes for part in parts)
        self.skipped: dict[str, int] = {}
        for part in parts:
            self.skipped.update(part.skipped)
        self._parts = [part for part in parts if part.documents]
        self._ends = list(itertools.accumulate(part.documents for part in self._parts))
        self._open_files = OpenFiles(_OPEN_FILES)
        self._blocks: OrderedDict[tuple[int, int], list[int]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _find(self, i: int) -> tuple[int, int, int]:
        """The part of document i, and where its text begins and ends there."""
        part = bisect_right(self._ends, i)
        local = i - (self._ends[part - 1] if part else 0)
        block = local // _BLOCK
        ends = self._block_ends(part, block)
        within = local - block * _BLOCK
        return part, ends[within], ends[within + 1]

    def _read(self, where: int, begin: int, end: int) -> bytes:
        return read_exactly(self._open_files, self._parts[where].text, begin, end - begin)

    def _block_ends(self, part: int, block: int) -> list[int]:
        """Where the text before a block of a part and that of each of its documents ends."""
        key = part, block
        ends = self._blocks.get(key)
        if ends is not None:
            self._blocks.move_to_end(key)
            return ends
        first = block * _BLOCK
        last = min(first + _BLOCK, self._parts[part].documents)
        begin = max(0, first - 1)
        raw = read_exactly(self._open_files, self._parts[part].ends, 8 * begin, 8 * (last - begin))
        ends = np.frombuffer(raw, "<i8").tolist()
        if not block:
            ends.insert(0, 0)
        self._blocks[key] = ends
        if len(self._blocks) > _BLOCKS_KEPT:
            self._blocks.popitem(last=False)
        return ends


# Preparing -----------------------------------------------------------------------------------------------------------


def open_documents(
    files: list[InputFile],
    text_field: str,
    on_error: OnError,
    cache: str | Path | None,
    name: str,
    key: str,
) -> StoredDocuments:
    """The documents of `files`; what is not in the cache yet is read, checked and written there.

    Any number of processes may open the same files at once: they share the work, part by part.
    `name` is what the configuration calls the source, `key` where. Raises UserError as `read_documents` finds
    (with `on_error` "skip" only when no document is left), or when the cache cannot be written, and OSError.
    """
    folder = cache_folder(cache) / "text"
    groups = parts_of(files)
    progress = _Progress(name, len(groups))

    def prepare(number: int) -> Part | None:
        part = _prepare_if_free(groups[number], text_field, on_error, folder, progress.advance)
        progress.done += part is not None
        return part

    parts = do_each_once(len(groups), prepare)
    progress.close()
    documents = StoredDocuments(name, parts, len(files))
    if not len(documents) and documents.skipped:
        reason = next(part.reason for part in parts if part.reason)
        raise UserError(f"{key}: no document of {name} can be read: {reason}")
    return documents


def parts_of(files: Sequence[InputFile]) -> list[list[InputFile]]:
    """Neighbouring files in groups of up to 64 MiB, larger files alone: fixed by the files' sizes."""
    groups: list[list[InputFile]] = []
    size = _PART_BYTES
    for file in files:
        file_bytes = file.size if file.size >= 0 else _PART_BYTES
        if not groups or size + file_bytes > _PART_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file_bytes
    return groups


def prepare_part(files: list[InputFile], text_field: str, on_error: OnError, folder: Path) -> Part:
    """The documents of `files` in `folder`, which other processes may be preparing. Raises as `open_documents`."""
    (part,) = do_each_once(
        1, lambda _: _prepare_if_free(files, text_field, on_error, folder, lambda size: None)
    )
    return part


def _prepare_if_free(
    files: list[InputFile], text_field: str, on_error: OnError, folder: Path, progress: Callable[[int], None]
) -> Part | None:
    """The part, prepared now unless it was before; None while another process prepares it."""
    path = folder / _part_key(files, text_field, on_error)
    part = _complete_part(path)
    if part is not None:
        return part
    with try_lock(Path(f"{path}.lock")) as mine:
        if not mine:
            return None
        return _complete_part(path) or _write_part(path, files, text_field, on_error, progress)


def _part_key(files: list[InputFile], text_field: str, on_error: OnError) -> str:
    identity = [[file.identity, file.size, file.stamp] for file in files]
    content = json.dumps([_READER_VERSION, text_field, on_error, identity])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _complete_part(path: Path) -> Part | None:
    """A part that is in the cache and whole."""
    if not os.path.exists(f"{path}.meta"):
        return None
    try:
        with cache_errors(path.parent):
            meta = json.loads(with_retries(Path(f"{path}.meta").read_bytes, f"{path}.meta"))
            part = Part(path, meta["documents"], meta["num_bytes"], meta["skipped"], meta["reason"])
            sizes = _size(part.text), _size(part.ends)
    except (ValueError, KeyError, TypeError):  # damaged: it is prepared again
        return None
    return part if sizes == (part.num_bytes, 8 * part.documents) else None


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None


def _write_part(
    path: Path,
    files: list[InputFile],
    text_field: str,
    on_error: OnError,
    progress: Callable[[int], None],
) -> Part:
    """Written under temporary names, which whoever holds the lock on this node may overwrite."""
    writer = _PartWriter(path, on_error, progress)
    try:
        for file in files:
            writer.file = file.name
            read_documents(file, text_field, writer)
        return writer.finish()
    finally:
        writer.close()


class _PartWriter:
    """A `Sink` that writes a part."""

    def __init__(self, path: Path, on_error: OnError, progress: Callable[[int], None]) -> None:
        self.file = ""  # that is being read
        self._path = path
        self._on_error = on_error
        self._progress = progress
        self._skipped: dict[str, int] = {}
        self._reason: str | None = None
        self._begin = self._end = 0  # of the current document
        self._documents = 0
        self._ends: list[int] = []
        self._temporary = {
            suffix: temporary_name(Path(f"{path}{suffix}")) for suffix in (".text", ".ends", ".meta")
        }
        with cache_errors(path.parent):
            self._text_file = open_temporary(self._temporary[".text"])
            self._ends_file = open_temporary(self._temporary[".ends"])

    def write(self, piece: bytes) -> None:
        try:
            self._text_file.write(piece)
        except OSError:
            with cache_errors(self._path.parent):
                raise
        self._end += len(piece)

    def end(self) -> None:
        if self._end == self._begin:
            return  # empty: no document
        self._begin = self._end
        self._ends.append(self._end)
        if len(self._ends) >= _ENDS_AT_ONCE:
            self._write_ends()

    def bad(self, error: UserError) -> None:
        if self._on_error == "raise":
            raise error
        if self._end > self._begin:
            with cache_errors(self._path.parent):
                self._text_file.seek(self._begin)
                self._text_file.truncate()
            self._end = self._begin
        self._skipped[self.file] = self._skipped.get(self.file, 0) + 1
        self._reason = self._reason or str(error)

    def finish(self) -> Part:
        """Makes the part complete: its meta data come last."""
        self._write_ends()
        part = Part(self._path, self._documents, self._end, self._skipped, self._reason)
        meta = asdict(part) | {"path": self._path.name}
        with cache_errors(self._path.parent):
            publish(self._text_file, Path(part.text))
            publish(self._ends_file, Path(part.ends))
            with open_temporary(self._temporary[".meta"]) as file:
                file.write(json.dumps(meta).encode())
                publish(file, Path(f"{self._path}.meta"))
            sync(self._path.parent)
        return part

    def close(self) -> None:
        """Nothing half-written stays."""
        for file in (self._text_file, self._ends_file):
            try:
                file.close()
            except OSError:  # a full disk, which was reported
                pass
        for temporary in self._temporary.values():
            temporary.unlink(missing_ok=True)

    def _write_ends(self) -> None:
        with cache_errors(self._path.parent):
            self._ends_file.write(np.array(self._ends, "<i8").tobytes())
        self._documents += len(self._ends)
        self._ends = []
        self._progress(self._end)


class _Progress(ProgressLine):
    """On a terminal, when preparing takes more than two seconds."""

    def __init__(self, name: str, parts: int) -> None:
        super().__init__(sys.stderr)
        self.done = 0
        self._name = name
        self._parts = parts
        self._next = time.monotonic() + 2 if self.terminal else float("inf")

    def advance(self, part_bytes: int) -> None:
        """`part_bytes` of the current part are written."""
        if (now := time.monotonic()) >= self._next:
            self._next = now + 0.5
            written = f"{self.done} of {self._parts} parts, {part_bytes / 1e6:.0f} MB of one"
            self.show(f"preparing {self._name}: {written}")
