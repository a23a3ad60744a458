"""The cache folder of unpacked text and fetched shards: locks, and files that are complete or absent."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from mf_train.errors import UserError
from mf_train.files import user_cache

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_BUFFER_BYTES = 1 << 20
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0  # seconds between looks at what other processes hold

T = TypeVar("T")


def cache_folder(setting: str | Path | None) -> Path:
    """`data.cache`, or else mf_train in the user's cache ($XDG_CACHE_HOME, ~/.cache)."""
    return user_cache() if setting is None else Path(setting)


@contextmanager
def cache_errors(folder: Path) -> Iterator[None]:
    """Turns an OSError of using the cache into a UserError that names the folder and the setting."""
    try:
        yield
    except OSError as error:
        reason, wanted = error.strerror or str(error), "with enough free space"
        if error.errno in _FULL:
            reason = "it is full"
        elif error.errno in _FORBIDDEN:
            wanted = (
                "that this user may write to; before its first use, chmod g+rwxs makes a folder its group's"
            )
        elif error.errno in _NO_LOCKS:
            reason, wanted = f"flock: {reason}", "on a disk of the node, or on a file system that has flock"
        raise UserError(
            f"the cache {folder} cannot be used ({reason}): set data.cache to a folder {wanted}"
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder of the cache where there is none; one in a group's is the group's, whatever the umask."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    if _is_a_group_s(folder):
        with suppress(PermissionError):  # another user's, who made it meanwhile
            folder.chmod(folder.stat().st_mode | stat.S_IWGRP)


def _is_a_group_s(folder: Path) -> bool:
    """Whether what is made in it belongs to its group (chmod g+s), which new folders in it inherit on Linux."""
    return bool(folder.stat().st_mode & stat.S_ISGID)


def open_temporary(path: Path) -> BinaryIO:
    """Create a file of that name; replaces one left by a killed process, perhaps of another user."""
    path.unlink(missing_ok=True)
    return open(path, "wb", buffering=_BUFFER_BYTES)


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether this process now holds the lock file `path` alone. A process that ends, however, gives it back."""
    from filelock import FileLock, Timeout

    with cache_errors(path.parent):
        make_folder(path.parent)
        mode = 0o664 if _is_a_group_s(path.parent) else 0o644
        # a soft lock, where there is no flock, would stay for ever when its process is killed
        lock = FileLock(path, mode=mode, thread_local=False, fallback_to_soft=False)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            pass
    try:
        yield lock.is_locked
    finally:
        lock.release()


def do_each_once(count: int, attempt: Callable[[int], T | None]) -> list[T]:
    """Call attempt(0) ... attempt(count - 1) and return their results.

    An attempt that returns None is being done by another process and is repeated later. Every process begins
    with another number, so that those that start together do not wait for each other.
    """
    results: dict[int, T] = {}
    start = zlib.crc32(f"{socket.gethostname()} {os.getpid()}".encode()) % max(1, count)
    waiting = [*range(start, count), *range(start)]
    pause = _SHORTEST_PAUSE
    while waiting:
        left = []
        for number in waiting:
            result = attempt(number)
            if result is None:
                left.append(number)
            else:
                results[number] = result
        pause = _SHORTEST_PAUSE if len(left) < len(waiting) else min(2 * pause, _LONGEST_PAUSE)
        waiting = left
        if waiting:
            time.sleep(pause)
    return [results[number] for number in range(count)]


def temporary_name(final: Path) -> Path:
    """The name under which `final` is written. Each node has its own: some file systems lock within a node only."""
    return final.with_name(f"{final.name}.{socket.gethostname()}.tmp")
