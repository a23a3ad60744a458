"""Input files, local or behind a URL: which a `path` means, and their bytes."""

from __future__ import annotations

import errno
import glob
import io
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from mf_train.config.paths import expand_path
from mf_train.data.files.access import (
    file_system,
    has_magic,
    is_url,
    list_url,
    metadata_or_none,
    reason_of,
    size_of,
    stamp_of,
    with_driver_retries,
    with_retries,
)
from mf_train.errors import UserError

JSON_LINES = (".jsonl", ".json")
CSV = (".csv", ".tsv")
TEXT = (".txt",)
ARROW = (".parquet", ".arrow")
TOKENS = (".bin",)
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")  # of JSON Lines, CSV and text

_COMPRESSIBLE = {*JSON_LINES, *CSV, *TEXT}
_FORMATS = {*_COMPRESSIBLE, *ARROW, *TOKENS}
KNOWN_FORMATS = (
    ".jsonl, .json (one object a line), .csv, .tsv, .txt (each also .gz, .zst, .xz or .bz2), .parquet, .arrow, "
    ".bin with .idx"
)
# beside the .arrow files of a folder that `Dataset.save_to_disk` of HF datasets wrote
_SAVED_STATE, _SAVED_SPLITS = "state.json", "dataset_dict.json"
_SAVED_BESIDE = (_SAVED_STATE, "dataset_info.json")

_BUFFER_BYTES = 1 << 20
REMOTE_BLOCK_BYTES = 4 << 20

T = TypeVar("T")


class UnreadableFileError(UserError):
    """A file that cannot be read as it is now, whatever it holds: no damage of its content."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file found by a path: its name or URL, size in bytes (-1 if the server does not report one), and a stamp."""

    name: str
    size: int
    stamp: str  # changes when the content does: mtime in nanoseconds, or an ETag or the like; "" if there is none

    @property
    def remote(self) -> bool:
        return is_url(self.name)

    @property
    def identity(self) -> str:
        """The same for the same file under another relative path or through a link."""
        if self.remote:
            return self.name
        if os.path.islink(self.name):
            return os.path.realpath(self.name)
        folder, name = os.path.split(self.name)
        return os.path.join(_real_folder(os.path.abspath(folder)), name)

    def open(self) -> BinaryIO:
        """The file's bytes, buffered and seekable where the server can. Transient errors are retried.

        Raises OSError naming the file, and UnreadableFileError when it ends before its size.
        """
        return io.BufferedReader(_ReopeningFile(self), _BUFFER_BYTES)


@lru_cache(maxsize=1024)  # of 100,000 files
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def file_format(path: str | Path) -> str | None:
    """The extension that says how `path` is read, without the compression's; None when it is not known."""
    *before, last = ["", *_suffixes(path)]
    found, formats = (before[-1], _COMPRESSIBLE) if last in COMPRESSED and before else (last, _FORMATS)
    return found if found in formats else None


def compression(path: str | Path) -> str | None:
    """One of COMPRESSED, or None."""
    last = _suffixes(path)[-1:]
    return last[0] if last and last[0] in COMPRESSED else None


def _suffixes(path: str | Path) -> list[str]:
    name = without_query(str(path)).rpartition("/")[2]
    name = name.lstrip(".")  # a hidden file's first dot begins no suffix
    return [f".{suffix}" for suffix in name.lower().split(".")[1:]]


def without_query(name: str) -> str:
    """A name or URL, one of HTTP without its query and fragment; elsewhere "?" and "#" may be part of a name."""
    if name.startswith(("http://", "https://")):
        return name.split("?")[0].split("#")[0]
    return name


def is_token_shard(file: InputFile) -> bool:
    """Whether the file is a .bin of tokens, not text."""
    return file_format(file.name) in TOKENS


class FoundFiles(list[InputFile]):
    """The files of a source, sorted. `left_out`: names of the others in its folder, whose formats are not known."""

    left_out: list[str]

    def __init__(self, files: Iterable[InputFile], left_out: Iterable[str] = ()) -> None:
        super().__init__(files)
        self.left_out = list(left_out)


def find_files(path: str, key: str) -> FoundFiles:
    """Sorted files that a `path` means: a file, a folder (its known files, recursively, also behind links), a glob
    (also `**`), or a URL of one of these that a driver of fsspec reads (s3://, gs://, https://, hf:// ...).

    Of a folder that HF datasets' `save_to_disk` wrote these are the data. Token shards are given by their .bin; `path`
    may be Megatron's prefix of one, without .bin and .idx.
    Raises UserError when there is none, a named file's format is not known, or text and shards are mixed, and
    OSError when the machine or the server fails, after retries.
    """
    if not is_url(path):
        found = _find_local(path, key)
    elif path.startswith(("file://", "local://")):
        found = _find_local(path.split("://", 1)[1], key)
    else:
        found = _find_remote(path, key)
    shards = [is_token_shard(file) for file in found]
    if any(shards) and not all(shards):
        text = found[shards.index(False)].name
        raise UserError(
            f"{key}: {path} holds both token shards and text ({text}): make them two sources, such as "
            f"{path.rstrip('/')}/*.bin"
        )
    return found


# Local files ---------------------------------------------------------------------------------------------------------


def _find_local(path: str, key: str) -> FoundFiles:
    expanded = Path(expand_path(path, key))
    if expanded.is_dir():
        try:
            found = (name.removeprefix("./") for name in _walk(str(expanded)))
            names = sorted(found, key=lambda name: name.split("/"))
        except OSError as error:
            raise UserError(
                f"{key}: {error.filename} cannot be listed ({error.strerror}): check its permissions"
            ) from error
        _refuse_lost_folders(names, key)
        known, left_out = _of_folder(names, path, key)
        return FoundFiles(_stat_all(known, key), left_out)
    if expanded.is_file():
        named = [str(expanded)]
    elif os.path.isfile(f"{expanded}.bin") and os.path.isfile(f"{expanded}.idx"):
        named = [f"{expanded}.bin"]
    elif glob.has_magic(path):
        matches = glob.glob(str(expanded), recursive=True)
        _refuse_lost_folders(sorted({*matches, *_above(str(expanded))}), key)
        named = [str(file) for file in sorted(map(Path, matches)) if file.is_file() or _is_lost(str(file))]
    else:
        raise UserError(f"{key}: {path} does not exist: check the path and the working folder {Path.cwd()}")
    if not named:
        raise UserError(
            f"{key}: no file matches {path}: check the pattern and the working folder {Path.cwd()}"
        )
    return FoundFiles(_stat_all(_known(_shards_once(named), key), key))


def _walk(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Files below a folder, without hidden ones, and links whose target is gone.

    Links are followed, but for those to a folder that they are in.
    """
    status = os.stat(folder)
    if (own := (status.st_dev, status.st_ino)) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, above | {own})
            elif entry.is_file() or _is_lost(entry.path):
                yield entry.path


def _is_lost(path: str) -> bool:
    """Whether it is a link whose target is gone, as behind a mount that is down."""
    return os.path.islink(path) and not os.path.exists(path)


def _refuse_lost_folders(names: list[str], key: str) -> None:
    """Raises UserError for a lost link without a suffix: it may be to a folder, whose files would be left out."""
    _stat_all([name for name in names if not _suffixes(name) and _is_lost(name)], key)


def _above(pattern: str) -> Iterator[str]:
    """What the folders of a pattern match: glob passes over those that are lost."""
    while glob.has_magic(pattern := os.path.dirname(pattern)):
        yield from glob.iglob(pattern, recursive=True)


def _stat_all(paths: list[str], key: str) -> list[InputFile]:
    files = []
    for path in paths:
        try:
            status = with_retries(lambda: os.stat(path), path)  # noqa: B023
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise  # else deleted meanwhile, the .bin of a named .idx, or a link whose target is gone
            raise UserError(f"{key}: {path} does not exist: put it back or name other files") from None
        files.append(InputFile(path, status.st_size, str(status.st_mtime_ns)))
    return files


def _of_folder(names: list[str], path: str, key: str) -> tuple[list[str], list[str]]:
    """Those of a folder's files that are read, and those that are left out because their formats are not known."""
    by_folder = defaultdict(set)
    for name in names:
        by_folder[posixpath.dirname(name)].add(posixpath.basename(name))
    for folder, inside in by_folder.items():
        if _SAVED_SPLITS in inside:
            splits = sorted(
                other[len(folder) + 1 :]
                for other, its in by_folder.items()
                if posixpath.dirname(other) == folder and _SAVED_STATE in its
            )
            raise UserError(
                f"{key}: {folder} holds a dataset's splits ({', '.join(splits)}): name one of them, such as "
                f"{folder}/{(splits or ['train'])[0]}"
            )
    formats = [file_format(name) for name in names]
    shards = any(kind in TOKENS for kind in formats)
    known, left_out = [], []
    for name, kind in zip(names, formats, strict=True):
        folder, own = posixpath.split(name)
        beside = by_folder[folder]
        if _SAVED_STATE in beside and (own in _SAVED_BESIDE or own.startswith("cache-")):
            continue  # what HF datasets keeps for itself
        if shards and own == "manifest.json":
            continue  # what `data tokenize` writes beside them
        if kind:
            known.append(name)
        elif not (own.endswith(".idx") and f"{own.removesuffix('.idx')}.bin" in beside):
            left_out.append(name)
    if not known:
        raise UserError(f"{key}: folder {path} has no file of a known format: it needs {KNOWN_FORMATS}")
    return known, left_out


def _shards_once(names: list[str]) -> list[str]:
    """Without .idx files: a shard is called by its .bin, which a pattern may match as well."""
    present = set(names)
    once = []
    for name in names:
        path = without_query(name)
        if path.endswith(".idx"):
            shard = f"{path.removesuffix('.idx')}.bin{name[len(path) :]}"
            if shard in present:
                continue
            name = shard
        once.append(name)
    return once


def _known(names: list[str], key: str) -> list[str]:
    for name in names:
        if file_format(name) is None:
            raise UserError(f"{key}: {name} is not of a known format: use {KNOWN_FORMATS}")
    return names


# Remote files --------------------------------------------------------------------------------------------------------


def _find_remote(url: str, key: str) -> FoundFiles:
    system, path = file_system(url, f"{key}: ")
    listing = metadata_or_none(lambda: list_url(system, path, url), url, f"{key}: ")
    if not listing:
        raise UserError(f"{key}: no file matches {url}: check the URL and that its credentials may read it")
    infos = {system.unstrip_protocol(name): info for name, info in listing.items()}
    names = sorted(infos, key=lambda name: name.split("/"))  # as local files are sorted
    left_out: list[str] = []
    if has_magic(url) or listing.keys() <= {path, f"{path}.bin"}:
        names = _known(_shards_once(names), key)
    else:
        root = url.rstrip("/").count("/") + 1
        visible = [name for name in names if not any(p.startswith(".") for p in name.split("/")[root:])]
        names, left_out = _of_folder(visible, url, key)
    files = []
    for name in names:
        if name not in infos or infos[name].get("size") is None:  # the .bin of a named .idx; an HTML listing
            infos[name] = _info_or_none(system, name, f"{key}: ")
        if infos[name] is None:
            raise UserError(f"{key}: {name} does not exist: put it back or name other files")
        files.append(InputFile(name, size_of(infos[name]), stamp_of(infos[name])))
    return FoundFiles(files, left_out)


def _info_or_none(system: Any, url: str, where: str = "") -> Any:
    return metadata_or_none(lambda: system.info(system._strip_protocol(url)), url, where)


def file_at(url: str) -> InputFile | None:
    """The remote file; None when there is none. Raises UserError (no permission), and OSError after retries."""
    info = _info_or_none(file_system(url)[0], url)
    return None if info is None else InputFile(url, size_of(info), stamp_of(info))


def files_in(folder: str) -> dict[str, InputFile]:
    """The files of a remote folder by URL, without asking for each; {} where the server does not list them.

    Raises OSError after retries.
    """
    if folder.startswith(("http://", "https://")):  # at most a page of links
        return {}
    system, path = file_system(folder)
    system.invalidate_cache()
    try:
        infos = with_driver_retries(lambda: system.ls(path, detail=True), folder)
    except (FileNotFoundError, PermissionError, ValueError):  # one may be allowed to read but not to list
        return {}
    files = {
        system.unstrip_protocol(info["name"]): info
        for info in infos
        if info["type"] == "file" and info.get("size") is not None
    }
    return {url: InputFile(url, size_of(info), stamp_of(info)) for url, info in files.items()}


# Reading -------------------------------------------------------------------------------------------------------------


class _ReopeningFile(io.RawIOBase):
    """An InputFile's bytes. After a transient error it is opened again and continues where it was."""

    def __init__(self, file: InputFile) -> None:
        self.name = file.name
        self._input = file
        self._position = 0
        self._file: BinaryIO | None = None
        self._file = self._retried(self._open)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._block_bytes()) or not self._input.remote

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END and self._input.size < 0:
            raise UnreadableFileError(
                f"{self.name}: the server does not say its size, which this format needs: copy it to a disk"
            )
        self._position = (
            offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._input.size}[whence]
        )
        if self._file is not None:
            self._file.seek(self._position)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._retried(lambda: self._read(len(buffer)))
        if not data and self._position < self._input.size and len(buffer):
            raise UnreadableFileError(
                f"{self.name} ended early: at byte {self._position} of {self._input.size}: it was cut or changed "
                "while it was read; restore it"
            )
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._file is None:
                self._file = self._open()
            data = self._file.read(size)
        except Exception:
            self._drop()
            raise
        if not data and size and self._input.remote and self._position < self._input.size:
            self._drop()
            raise OSError(f"the connection ended at byte {self._position} of {self._input.size}")
        return data

    def _open(self) -> BinaryIO:
        if not self._input.remote:
            file = cast(BinaryIO, open(self.name, "rb", buffering=0))
        else:
            system, path = file_system(self.name)
            file = cast(BinaryIO, system.open(path, "rb", block_size=self._block_bytes()))
        if self._position:
            try:
                file.seek(self._position)
            except ValueError:  # a stream: what was read already comes again
                left = self._position
                while left and (skipped := len(file.read(min(left, REMOTE_BLOCK_BYTES)))):
                    left -= skipped
        return file

    def _block_bytes(self) -> int:
        """0, a stream, where a server of HTTP need not know ranges: only Arrow's formats are read at random."""
        sequential = file_format(self.name) not in ARROW
        return 0 if sequential and self.name.startswith(("http://", "https://")) else REMOTE_BLOCK_BYTES

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except Exception:  # of a broken connection: it is given up anyway
                pass

    def _retried(self, action: Callable[[], T]) -> T:
        try:
            return with_driver_retries(action, self.name)
        except ValueError as error:
            raise UnreadableFileError(
                f"{self.name}: cannot be read ({reason_of(error)}): copy it to a disk"
            ) from error
