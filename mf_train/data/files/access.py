"""What servers say of URLs, through fsspec: its errors sorted, its gaps closed. The only file that imports it."""

from __future__ import annotations

import errno
import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mf_train.data.files.retry import WAITS, with_retries
from mf_train.errors import UserError

# What tells two versions of a remote file apart, as the drivers of fsspec call it: the best first.
_STAMPS = (
    "ETag etag Digest Content-MD5 md5Hash md5 crc32c blob_id last_commit sha256 checksum "
    "LastModified Last-Modified last_modified updated mtime modified created"
).split()

T = TypeVar("T")


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


def asked(action: Callable[[], T], url: str, where: str = "") -> T | None:
    """What a server says of a URL; None: there is no such file. Raises UserError, and OSError after retries."""
    try:
        return patiently(action, url)
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
            info = _unmasked(lambda: system.info(path))
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
    """fsspec's walk takes a folder whose listing raises OSError for an empty one; here it is raised."""
    ls, async_ls = system.ls, getattr(system, "_ls", None)  # drivers that are asynchronous walk by the second

    def carried(error: OSError) -> Exception:
        meant = _meant(error)
        return meant if isinstance(meant, FileNotFoundError) else _ListingError(meant)

    def strict_ls(*arguments: Any, **options: Any) -> Any:
        try:
            return ls(*arguments, **options)
        except OSError as error:
            raise carried(error) from error

    async def strict_async_ls(*arguments: Any, **options: Any) -> Any:
        assert async_ls is not None
        try:
            return await async_ls(*arguments, **options)
        except OSError as error:
            raise carried(error) from error

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


def patiently(action: Callable[[], T], url: str) -> T:
    """The action's result, repeated while it fails transiently. Raises OSError, UserError or ValueError."""
    return with_retries(lambda: _as_os_error(action), url, WAITS)


def _as_os_error(action: Callable[[], T]) -> T:
    """Drivers and their HTTP clients raise types of their own for a server's bad minute; ValueError stays."""
    try:
        return _unmasked(action)
    except (OSError, UserError, ValueError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {reason_of(error)}") from error


def _unmasked(action: Callable[[], T]) -> T:
    try:
        return action()
    except FileNotFoundError as error:
        raise _meant(error) from error.__cause__


def _meant(error: OSError) -> OSError:
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
