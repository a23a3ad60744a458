"""Access that survives a bad minute: retries, URLs through fsspec, and reads with few file descriptors.

The only file that imports fsspec: what its drivers raise is sorted into mistakes of the user and failures that may
pass, and folders that they leave out of a listing are errors.
"""

from __future__ import annotations

import errno
import glob
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

# What tells two versions of a remote file apart, as the drivers of fsspec call it: the best first.
_STAMPS = (
    "ETag etag Digest Content-MD5 md5Hash md5 crc32c blob_id last_commit sha256 checksum "
    "LastModified Last-Modified last_modified updated mtime modified created"
).split()

T = TypeVar("T")


def is_transient(error: OSError) -> bool:
    """Whether trying again may help. Clients of object stores raise OSError without a number for time-outs."""
    if error.errno is None:
        return not isinstance(error, _LASTING)
    return error.errno in _TRANSIENT


def with_retries(action: Callable[[], T], what: str, waits: Sequence[float] = WAITS) -> T:
    """Call `action()`, again after each of `waits` seconds while it fails transiently, and return its result.

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


# URLs ----------------------------------------------------------------------------------------------------------------


def is_url(path: str) -> bool:
    return "://" in path


def file_system(url: str, where: str = "") -> tuple[Any, str]:
    """The fsspec file system that reads the URL, and the path in it. Raises UserError when there is none."""
    import fsspec  # type: ignore[import-untyped]

    if "::" in url:
        raise UserError(f"{where}{url}: chained URLs are not supported: unpack the archive first")
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{where}{url} needs another package: {reason_of(error)}") from None
    except ValueError as error:
        raise UserError(f"{where}{url} cannot be read: {reason_of(error)}") from None
    return system, path


def metadata_or_none(action: Callable[[], T], url: str, where: str = "") -> T | None:
    """What `action` learns of a URL; None if there is no such file. Raises UserError, and OSError after retries."""
    try:
        return with_driver_retries(action, url)
    except FileNotFoundError:
        return None
    except (PermissionError, ValueError) as error:
        raise UserError(
            f"{where}{url} cannot be listed ({reason_of(error)}): check the URL and its credentials"
        ) from error


def list_url(system: Any, path: str, url: str) -> dict[str, Any]:
    """The files a URL means, with what the server says of them. Raises FileNotFoundError and what the driver does."""
    system.invalidate_cache()  # of listings made earlier
    if has_magic(url):
        with _nothing_omitted(system):
            listing = system.glob(path, detail=True)
    elif url.endswith("/"):
        with _nothing_omitted(system):
            listing = system.find(path, detail=True)
    else:
        try:
            info = _without_fsspec_mask(lambda: system.info(path))
        except FileNotFoundError:
            info = system.info(f"{path}.bin")  # Megatron's prefix
            system.info(f"{path}.idx")  # exists() takes any error for a no
            return {f"{path}.bin": info}
        with _nothing_omitted(system):
            listing = {path: info} if info["type"] == "file" else system.find(path, detail=True)
    return {name: info for name, info in listing.items() if info["type"] == "file"}


class _ListingError(Exception):
    """Carries an OSError through fsspec's walk."""


@contextmanager
def _nothing_omitted(system: Any) -> Iterator[None]:
    """fsspec's walk takes a folder whose listing raises OSError for an empty one; here it is raised.

    (Its option `on_error` does not reach the folders below the first.)
    """
    ls, async_ls = system.ls, getattr(system, "_ls", None)  # drivers that are asynchronous walk by the second

    def wrapped(error: OSError) -> Exception:
        real = _as_real_error(error)
        return real if isinstance(real, FileNotFoundError) else _ListingError(real)

    def strict_ls(*arguments: Any, **options: Any) -> Any:
        try:
            return ls(*arguments, **options)
        except OSError as error:
            raise wrapped(error) from error

    async def strict_async_ls(*arguments: Any, **options: Any) -> Any:
        assert async_ls is not None
        try:
            return await async_ls(*arguments, **options)
        except OSError as error:
            raise wrapped(error) from error

    system.ls = strict_ls
    if async_ls is not None:
        system._ls = strict_async_ls
    try:
        yield
    except _ListingError as error:
        raise error.args[0] from error.__cause__
    finally:
        del system.ls
        if async_ls is not None:
            del system._ls


def has_magic(url: str) -> bool:
    if url.startswith(("http://", "https://")):  # "?" begins a query there
        return any(character in url.split("?")[0] for character in "*[")
    return glob.has_magic(url)


def size_of(info: dict[str, Any]) -> int:
    return -1 if info.get("size") is None else int(info["size"])


def stamp_of(info: dict[str, Any]) -> str:
    return next((str(info[name]) for name in _STAMPS if info.get(name)), "")


def reason_of(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0][:300]
    return first or type(error).__name__


def with_driver_retries(action: Callable[[], T], url: str) -> T:
    """As `with_retries`, for what may call a driver of fsspec. Raises OSError, UserError or ValueError."""
    return with_retries(lambda: _as_os_error(action), url, WAITS)


def _as_os_error(action: Callable[[], T]) -> T:
    """Drivers and their HTTP clients raise types of their own for a server's bad minute; ValueError stays."""
    try:
        return _without_fsspec_mask(action)
    except (OSError, UserError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {reason_of(error)}") from error


def _without_fsspec_mask(action: Callable[[], T]) -> T:
    try:
        return action()
    except FileNotFoundError as error:
        raise _as_real_error(error) from error.__cause__


def _as_real_error(error: OSError) -> OSError:
    """fsspec's HTTP says "not found" also of a server that refuses or is out of reach or order; the cause is kept."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None or isinstance(cause, FileNotFoundError):
        return error
    status = getattr(cause, "status", None)
    if status in (401, 403):
        return PermissionError(errno.EACCES, f"the server answers {status}")
    of_http = type(cause).__module__.startswith("aiohttp")  # without a status: the connection was lost
    if isinstance(cause, OSError) or (of_http and status not in (404, 410)):
        return OSError(f"{type(cause).__name__}: {reason_of(cause)}")
    return error


# Reads of local files at random --------------------------------------------------------------------------------------


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
