"""A file system of fsspec for the tests, `flaky://`: files in memory, and faults on order."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class FlakyFile(AbstractBufferedFile):  # type: ignore[misc]
    """Every read of a range takes the next fault, if there is one; then it works no more until it is opened again."""

    _broken = _ended = False

    def _fetch_range(self, start: int, end: int) -> bytes:
        assert not self._broken, "used after it failed"
        FlakyFileSystem.reads.append((self.path, start))
        if FlakyFileSystem.faults and not self._ended:
            fault = FlakyFileSystem.faults.pop(0)
            if isinstance(fault, BaseException):
                self._broken = True
                raise fault
            self._ended = True
            end = start + fault
        elif self._ended:
            end = start
        return bytes(FlakyFileSystem.contents[self.path][start:end])


class FlakyFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """`contents` by path; `faults`: exceptions, or numbers of bytes after which a connection ends."""

    protocol = "flaky"
    cachable = False
    contents: ClassVar[dict[str, bytes]] = {}
    versions: ClassVar[dict[str, str]] = {}
    faults: ClassVar[list[BaseException | int]] = []
    reads: ClassVar[list[tuple[str, int]]] = []
    listing_faults: ClassVar[list[BaseException]] = []  # of the subclasses that raise them

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        folder = self._strip_protocol(path).rstrip("/")
        found: dict[str, dict[str, Any]] = {}
        for name, content in self.contents.items():
            if name == folder or not folder or name.startswith(f"{folder}/"):
                below = name.removeprefix(folder).removeprefix("/")
                if "/" in below:
                    inner = f"{folder}/{below.split('/')[0]}".removeprefix("/")
                    found[inner] = {"name": inner, "size": 0, "type": "directory"}
                else:
                    etag = self.versions.get(name, "1")
                    found[name] = {"name": name, "size": len(content), "type": "file", "ETag": etag}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = self._strip_protocol(path).rstrip("/")
        listed = {entry["name"]: entry for entry in self.ls(path)}
        return listed.get(path) or {"name": path, "size": 0, "type": "directory"}

    def exists(self, path: str, **kwargs: Any) -> bool:
        return self._strip_protocol(path) in self.contents

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: Any) -> FlakyFile:
        return FlakyFile(self, path, mode, block_size or 1 << 20)

    @classmethod
    def reset(cls) -> None:
        cls.contents, cls.versions, cls.faults, cls.reads, cls.listing_faults = {}, {}, [], [], []


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
