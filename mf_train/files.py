"""Writing that survives a crash: a file or folder is there as a whole or not at all. Errors name the file."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """An OSError of a call on an open file, which has no name, gets the file's."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_whole(path: Path, data: bytes, token: str = "partial") -> None:
    """Have a file hold `data` from one moment to the next. Raises OSError, and then leaves it as it was."""
    with replacing(path, token) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, token: str = "partial") -> Iterator[BinaryIO]:
    """A new file for the block to write, which takes the place of `path` when the block ends well.

    Raises OSError naming the file that is written, `beside(path, token)`; then, or when the block raises, `path` is as
    it was.
    """
    new = beside(path, token)
    try:
        with path_in_errors(new), new.open("wb") as file:
            yield file
            sync_file(file)
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def beside(path: Path, token: str) -> Path:
    """The hidden file beside `path` in which its next contents are written."""
    return path.with_name(f".{path.name.removeprefix('.')}.{token}")


def publish(file: BinaryIO, path: Path) -> None:
    """Give a written, open file its final name once its contents are on disk, and close it. Raises OSError."""
    sync_file(file)
    file.close()
    os.replace(file.name, path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a whole file and wait until it is on disk. Raises OSError."""
    with path_in_errors(path), path.open("wb") as file:
        file.write(data)
        sync_file(file)


def sync_file(file: IO[Any]) -> None:
    """Wait until what was written to an open file is on disk. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's contents or a folder's entries are on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Delete a folder that at no time is there by halves under its own name. Nothing where it is gone already."""
    removed = folder.with_name(f".removed-{secrets.token_hex(4)}")
    try:
        os.rename(folder, removed)
    except FileNotFoundError:
        return
    shutil.rmtree(removed, ignore_errors=True)


def user_cache() -> Path:
    """The project's folder in the user's cache: $XDG_CACHE_HOME/mf_train, by default ~/.cache/mf_train."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mf_train"
