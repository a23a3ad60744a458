"""Reads that survive a file system's or an object store's bad minute, and file descriptors that do not run out."""

from __future__ import annotations

import errno
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mf_train.errors import UserError

WAITS = (0.1, 0.4, 1.6, 6.4, 25.6)  # seconds before each repetition: 34 s in all

_TRANSIENT = {
    errno.EIO,
    errno.EAGAIN,
    errno.EBUSY,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOTCONN,
    errno.ESHUTDOWN,
}
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)

T = TypeVar("T")


def is_transient(error: OSError) -> bool:
    """Whether trying again may help. Clients of object stores raise OSError without a number for time-outs."""
    if error.errno is None:
        return not isinstance(error, _LASTING)
    return error.errno in _TRANSIENT


def with_retries(action: Callable[[], T], what: str, waits: Sequence[float] = WAITS) -> T:
    """What `action()` returns, which is repeated after each of `waits` seconds while it fails transiently.

    Raises the last OSError, naming the file `what`; one that does not pass by itself (no such file, no permission,
    a full disk) at once. Other exceptions are not touched.
    """
    for wait in (*waits, None):
        try:
            return action()
        except OSError as error:
            if not is_transient(error):
                if error.errno is None or error.filename is not None:
                    raise
                raise OSError(error.errno, error.strerror, what) from None
            if wait is None:
                reason = error.strerror or str(error) or type(error).__name__
                tried = f"{reason} (tried {len(waits) + 1} times in {sum(waits):.0f} s)"
                raise OSError(error.errno or errno.EIO, tried, what) from error
            time.sleep(wait)
    raise AssertionError


class OpenFiles:
    """Descriptors of files open for reading, by path: the `limit` last used stay open. Used from one thread."""

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def descriptor(self, path: str) -> int:
        """The file's descriptor, valid until another file is asked for. Raises OSError."""
        descriptor = self._descriptors.get(path)
        if descriptor is not None:
            self._descriptors.move_to_end(path)
            return descriptor
        while len(self._descriptors) >= self._limit:
            self._close_oldest()
        descriptor = self._descriptors[path] = self._open(path)
        return descriptor

    def forget(self, path: str) -> None:
        """Closes the file if it is open: the next use opens it again, as a stale handle needs."""
        descriptor = self._descriptors.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, (self._limit,)  # another process opens files of its own

    def close(self) -> None:
        while self._descriptors:
            self._close_oldest()

    def _open(self, path: str) -> int:
        while True:
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._descriptors:
                    raise
                self._close_oldest()  # the process has other files open, so that our limit is too high

    def _close_oldest(self) -> None:
        os.close(self._descriptors.popitem(last=False)[1])

    def __del__(self) -> None:
        self.close()


def read_exactly(files: OpenFiles, path: str, offset: int, size: int) -> bytes:
    """Bytes offset ... offset + size of a file. Raises UserError when it is shorter, OSError as `with_retries`."""
    try:  # nearly always enough
        data = os.pread(files.descriptor(path), size, offset)
        if len(data) == size:
            return data
    except OSError:
        pass  # happens again below, where it is named and retried
    buffer = bytearray(size)
    read_into(files, path, memoryview(buffer), offset)
    return bytes(buffer)


def read_into(files: OpenFiles, path: str, buffer: memoryview, offset: int) -> None:
    """Fills `buffer` (bytes, contiguous) from byte `offset` of a file. Raises as `read_exactly`."""
    done = 0
    while done < len(buffer):
        try:  # a closure and its retries cost more than the read
            count = os.preadv(files.descriptor(path), [buffer[done:]], offset + done)
        except OSError:
            count = with_retries(lambda: _read_anew(files, path, buffer[done:], offset + done), path)  # noqa: B023
        if not count:
            raise _ended_early(files, path, offset, len(buffer))
        done += count


def _read_anew(files: OpenFiles, path: str, buffer: memoryview, offset: int) -> int:
    files.forget(path)
    return os.preadv(files.descriptor(path), [buffer], offset)


def _ended_early(files: OpenFiles, path: str, offset: int, size: int) -> UserError:
    return UserError(
        f"{path} ended early: bytes {offset} to {offset + size} were wanted, it was "
        f"{os.fstat(files.descriptor(path)).st_size} bytes: it was cut or changed while it was used; restore it"
    )
