"""Writing that survives a crash: a file or folder is there as a whole or not at all. Errors name the file."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of a call on an open file, which has no name, gets the file's."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a whole file and wait until it is on disk. Raises OSError."""
    with naming(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, data: bytes, token: str) -> None:
    """Have a file hold `data` from one moment to the next. Raises OSError, and then leaves it as it was."""
    os.replace(prepare_whole(path, data, token), path)


def prepare_whole(path: Path, data: bytes, token: str) -> Path:
    """A file beside `path` that is to replace it, `beside(path, token)`. Raises OSError, and then leaves none."""
    place = beside(path, token)
    try:
        write_synced(place, data)
    except OSError:
        place.unlink(missing_ok=True)
        raise
    return place


def beside(path: Path, token: str) -> Path:
    """The hidden file beside `path` in which its next contents are written."""
    return path.with_name(f".{path.name.removeprefix('.')}.{token}")


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
