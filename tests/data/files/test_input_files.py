"""Which files a path means, local and remote, and their bytes through a server's bad minutes."""

from __future__ import annotations

import errno
import gzip
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped]

from mf_train.data.files import access as remote_module
from mf_train.data.files import input_files as files_module
from mf_train.data.files.input_files import InputFile, compression, file_format, find_files, is_token_shard
from mf_train.data.shards.fetch import local_files
from mf_train.errors import UserError
from tests.data.remote import FlakyFileSystem
from tests.data.texts import json_lines


def names(path: Path | str, root: Path | str = "") -> list[str]:
    found = [file.name for file in find_files(str(path), "data.train[0]")]
    return [name.removeprefix(f"{root}/") for name in found]


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")


def test_formats() -> None:
    for name, expected in {
        "a.jsonl": ".jsonl",
        "A.JSON.GZ": ".json",
        "s3://bucket/a.b.txt.zst": ".txt",
        "https://host/a.parquet?download=1#x": ".parquet",
        "x.bin": ".bin",
        "x.idx": None,
        "a.parquet.gz": None,
        "a.csv.xz": ".csv",
        "jsonl": None,
        "a.jsonl.bz2": ".jsonl",
        "data-00000-of-00002.arrow": ".arrow",
        "a.arrow.gz": None,
        "a.docx": None,
    }.items():
        assert file_format(name) == expected, name
    assert [compression(name) for name in ("a.txt.GZ", "https://h/a.json.zst?x=.gz", "a.txt")] == [
        ".gz",
        ".zst",
        None,
    ]


def test_files_are_found_in_sorted_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "b/2.jsonl", "b/10.jsonl", "a.jsonl", ".hidden/x.jsonl", "b/.partial.jsonl", "notes.md")
    touch(tmp_path, "b/[x].jsonl")
    monkeypatch.chdir(tmp_path)
    assert names(".") == names(tmp_path, tmp_path) == ["a.jsonl", "b/10.jsonl", "b/2.jsonl", "b/[x].jsonl"]
    assert names(f"file://{tmp_path}/b/2.jsonl", tmp_path) == ["b/2.jsonl"]
    assert names("b/*0.jsonl") == ["b/10.jsonl"]
    assert names("**/[ab0-9]*.jsonl") == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    assert names("b/[x].jsonl") == ["b/[x].jsonl"]  # a file's own name comes before the pattern


def test_a_folder_s_links_and_what_is_left_out(tmp_path: Path) -> None:
    """The same files as `**` finds, and links to a folder that they are in end the way down."""
    touch(
        tmp_path,
        "elsewhere/b.jsonl",
        "corpus/a.jsonl",
        "corpus/notes.md",
        "corpus/deep/x.PDF",
        "corpus/.git/y.md",
    )
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "corpus/c.jsonl").symlink_to(tmp_path / "elsewhere/b.jsonl")
    expected = ["corpus/a.jsonl", "corpus/c.jsonl", "corpus/linked/b.jsonl"]
    assert names(tmp_path / "corpus/**/*.jsonl", tmp_path) == expected
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/deep/loop").symlink_to(tmp_path / "corpus/deep")
    assert names(tmp_path / "corpus", tmp_path) == expected
    found = find_files(str(tmp_path / "corpus"), "k")
    assert [name.removeprefix(f"{tmp_path}/") for name in found.left_out] == [
        "corpus/deep/x.PDF",
        "corpus/notes.md",
    ]


def test_links_whose_target_is_gone(tmp_path: Path) -> None:
    """As behind a mount that is down: a run must not train on what is left."""
    touch(tmp_path, "corpus/a.jsonl", "corpus/en/b.jsonl")
    (tmp_path / "corpus/notes.md").symlink_to(tmp_path / "gone.md")
    assert names(tmp_path / "corpus", tmp_path) == ["corpus/a.jsonl", "corpus/en/b.jsonl"]
    assert find_files(str(tmp_path / "corpus"), "k").left_out == [str(tmp_path / "corpus/notes.md")]
    for link, paths in (
        ("corpus/c.jsonl", ["corpus", "corpus/*.jsonl", "corpus/**/*.jsonl"]),
        ("corpus/en/c.parquet", ["corpus", "corpus/*/*.[jp]*"]),
        ("corpus/linked", ["corpus", "corpus/[al]*", "corpus/*/*.jsonl", "corpus/**/*.jsonl"]),
    ):
        (tmp_path / link).symlink_to(tmp_path / "gone" / Path(link).name)
        for path in paths:
            with pytest.raises(UserError, match=rf"data.train\[0\]: .*{link} does not exist: put it back"):
                names(tmp_path / path)
        (tmp_path / link).unlink()
    (tmp_path / "corpus/loop.jsonl").symlink_to("loop.jsonl")
    with pytest.raises(UserError, match=r"loop.jsonl does not exist: put it back"):
        names(tmp_path / "corpus/*.jsonl")
    (tmp_path / "corpus/loop.jsonl").unlink()
    (tmp_path / "corpus/null").symlink_to(os.devnull)  # no file, but there
    assert names(tmp_path / "corpus", tmp_path) == ["corpus/a.jsonl", "corpus/en/b.jsonl"]


def test_token_shards(tmp_path: Path) -> None:
    touch(
        tmp_path, "p/a.bin", "p/a.idx", "p/b.bin", "p/b.idx", "p/manifest.json", "mixed/a.bin", "mixed/b.txt"
    )
    for path in ("p", "p/*.bin", "p/*.idx", "p/[ab].*"):
        assert names(tmp_path / path, tmp_path) == ["p/a.bin", "p/b.bin"], path
    for path in ("p/a", "p/a.bin", "p/a.idx"):  # the first is Megatron's prefix
        assert names(tmp_path / path, tmp_path) == ["p/a.bin"], path
    (file, _) = find_files(str(tmp_path / "p"), "k")
    assert is_token_shard(file) and local_files([file], None)[0] == tmp_path / "p" / "a.bin"
    with pytest.raises(UserError, match=r"both token shards and text .*mixed/b.txt.: .*mixed/\*\.bin"):
        names(tmp_path / "mixed")


def test_size_and_stamp(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl")
    os.utime(tmp_path / "a.jsonl", ns=(5, 17))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    link, file = (find_files(str(tmp_path / name), "k")[0] for name in ("link.jsonl", "a.jsonl"))
    assert file == InputFile(str(tmp_path / "a.jsonl"), 1, "17")
    assert link.identity == file.identity and not file.remote


def test_mistakes_are_named(tmp_path: Path, remote: type[FlakyFileSystem]) -> None:
    touch(tmp_path, "a.docx", "a.parquet.gz", "empty/readme.md", "lonely.idx")
    remote.contents["lonely.idx"] = b"x"
    for path, message in [
        (str(tmp_path / "a.jsonl"), r"data.train\[0\]: .*a.jsonl does not exist"),
        (str(tmp_path / "*.jsonl"), r"data.train\[0\]: no file matches .*\*.jsonl"),
        (str(tmp_path / "empty"), r"data.train\[0\]: folder .* has no file of a known format"),
        (str(tmp_path / "a.docx"), r"data.train\[0\]: .*a.docx is not of a known format: use .jsonl"),
        (str(tmp_path / "a.parquet.gz"), r"a.parquet.gz is not of a known format"),
        (str(tmp_path / "lonely.idx"), r"data.train\[0\]: .*lonely.bin does not exist"),
        ("flaky://lonely.idx", r"data.train\[0\]: flaky://lonely.bin does not exist"),
        ("nosuch://bucket/a.jsonl", r"data.train\[0\]: nosuch://.* cannot be read: Protocol not known"),
        ("zip://a.jsonl::flaky://a.zip", "chained URLs are not supported"),
        ("flaky://data/a.jsonl", r"data.train\[0\]: no file matches flaky://data/a.jsonl"),
        ("flaky://data/*.jsonl", "no file matches"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            names(path)
        assert "\n" not in str(caught.value)


def test_a_missing_driver_is_named(bare_environment: object, repository: Path) -> None:
    """In an environment without s3fs."""
    code = """
from mf_train.data.files.input_files import find_files
from mf_train.errors import UserError
try:
    find_files("s3://bucket/*.jsonl", "data.train[1]")
except UserError as error:
    print(error)
"""
    python = bare_environment(["torch", "numpy", "pyyaml", "safetensors"])  # type: ignore[operator]
    done = subprocess.run([python, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.stdout == (
        "data.train[1]: s3://bucket/*.jsonl needs another package: Install s3fs to access S3\n"
    ), done.stderr


def test_remote_files(remote: type[FlakyFileSystem]) -> None:
    for name in ("d/b/2.jsonl", "d/b/10.jsonl", "d/a.txt", "d/.hidden/x.jsonl", "d/b/.y.jsonl", "d/notes.md"):
        remote.contents[name] = b"x" * len(name)
    everything = ["d/a.txt", "d/b/10.jsonl", "d/b/2.jsonl"]
    root = "flaky:/"
    assert names("flaky://d", root) == names("flaky://d/", root) == everything
    assert names("flaky://d/b/*0.jsonl", root) == ["d/b/10.jsonl"]
    assert names("flaky://d/**/[0-9]*.jsonl", root) == everything[1:]
    (file,) = find_files("flaky://d/a.txt", "k")
    assert (file.size, file.stamp, file.remote) == (7, "1", True)
    remote.contents["t/x.bin"] = remote.contents["t/x.idx"] = b"x"
    assert (
        names("flaky://t", root)
        == names("flaky://t/x", root)
        == names("flaky://t/x.idx", root)
        == ["t/x.bin"]
    )


def test_transient_errors_are_survived(
    remote: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(files_module, "REMOTE_BLOCK_BYTES", 10_000)
    content = remote.contents["a.jsonl"] = os.urandom(100_000)
    (file,) = find_files("flaky://a.jsonl", "k")
    # a server's error, a time-out, a client's own exception, a connection that ends after 7 bytes and at once
    remote.faults = [OSError("503"), TimeoutError(), RuntimeError("aiohttp says no"), 10_000, 7, 0, 0]
    with file.open() as opened:
        assert opened.read() == content
    assert not remote.faults and len(remote.reads) >= 7 + 6
    remote.faults = [OSError("503")] * 4
    with file.open() as opened, pytest.raises(OSError, match=r"503 .tried 4 times.*flaky://.*a\.jsonl"):
        opened.read()
    remote.faults = [PermissionError(errno.EACCES, "denied")]
    with file.open() as opened, pytest.raises(PermissionError):
        opened.read()


class DriverError(Exception):
    """As botocore's and aiohttp's: no OSError. aiohttp's have a status when the server answered."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        if status is not None:
            self.status = status


DriverError.__module__ = "aiohttp.client_exceptions"


class FaultyListing(FlakyFileSystem):
    """`listing_faults`, one at a time, are raised by what asks for a folder or for a file's size."""

    protocol = "faulty"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if self.listing_faults and "healthy" not in path:
            raise self.listing_faults.pop(0)
        return super().ls(path, detail, **kwargs)


fsspec.register_implementation("faulty", FaultyListing, clobber=True)


def not_found(cause: BaseException) -> FileNotFoundError:
    """As fsspec's HTTP says it."""
    error = FileNotFoundError("faulty://d")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("url", ["faulty://d", "faulty://d/*.jsonl", "faulty://d/a.jsonl", "faulty://t/x"])
def test_a_listing_survives_a_bad_minute(
    url: str, remote: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "WAITS", (0.0, 0.0))
    remote.contents |= {"d/a.jsonl": b"x", "t/x.bin": b"x", "t/x.idx": b"x"}
    expected = names(url)
    assert len(expected) == 1
    for fault in (
        DriverError("Service Unavailable", 503),
        DriverError("Server disconnected"),
        not_found(DriverError("Service Unavailable", 503)),
        not_found(DriverError("Server disconnected")),
    ):
        remote.listing_faults = [fault]
        assert names(url) == expected
        remote.listing_faults = [fault] * 100
        with pytest.raises(OSError, match=rf"DriverError: Serv.* .tried 3 times.*{re.escape(url)}"):
            names(url)
    for refusal in (
        PermissionError("ExpiredToken"),
        not_found(DriverError("ExpiredToken", 403)),
        ValueError("ExpiredToken"),
    ):
        remote.listing_faults = [refusal] * 100
        with pytest.raises(
            UserError, match=rf"data.train.0.: {re.escape(url)} cannot be listed .*credentials"
        ):
            names(url)
    remote.listing_faults = [not_found(DriverError("Not Found", 404))] * 100
    with pytest.raises(UserError, match="no file matches"):
        names(url)


class Below(FaultyListing):
    """The folder "inner" is at fault, not those above it."""

    protocol = "below"

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        if path.endswith("/inner") and self.listing_faults:
            raise self.listing_faults.pop(0)
        return super().ls(path, detail, **kwargs)


class AsyncBelow(AsyncFileSystem):  # type: ignore[misc]
    """The same as a driver of S3 or HTTP is made."""

    protocol = "asyncbelow"
    cachable = False

    async def _ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        return Below().ls(path, detail)

    async def _info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return Below().info(path)


fsspec.register_implementation("below", Below, clobber=True)
fsspec.register_implementation("asyncbelow", AsyncBelow, clobber=True)


@pytest.mark.parametrize("system", ["below", "asyncbelow"])
@pytest.mark.parametrize("path", ["healthy", "healthy/**/*.jsonl"])
def test_a_folder_that_cannot_be_listed_is_not_left_out(
    system: str, path: str, remote: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As fsspec's walk does it."""
    url = f"{system}://{path}"
    monkeypatch.setattr(remote_module, "WAITS", (0.0, 0.0))
    remote.contents |= {"healthy/a.jsonl": b"x", "healthy/inner/b.jsonl": b"x"}
    expected = names(url)
    assert len(expected) == 2
    remote.listing_faults += [OSError("SlowDown"), TimeoutError("slow")]
    assert names(url) == expected and not remote.listing_faults
    remote.listing_faults += [OSError("SlowDown")] * 3
    with pytest.raises(OSError, match=rf"SlowDown .tried 3 times.*{re.escape(url)}"):
        names(url)


def test_what_is_beside_a_shard_is_asked_again(
    remote: type[FlakyFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "WAITS", (0.0, 0.0))
    remote.contents |= {"t/x.bin": b"tokens", "t/x.idx": b"index"}
    (file,) = find_files("faulty://t/x", "k")
    fault = DriverError("Service Unavailable", 503)
    remote.listing_faults = [fault] * 100
    with pytest.raises(OSError, match=r"DriverError: Service Unavailable .tried 3 times.*faulty://t"):
        local_files([file], tmp_path)
    # the folder may not be listed: the files are asked for one by one
    remote.listing_faults = [fault, PermissionError("AccessDenied"), fault, fault]
    assert local_files([file], tmp_path)[0].with_suffix(".idx").read_bytes() == b"index"
    assert remote.listing_faults == []


def test_seeking_in_a_remote_file(remote: type[FlakyFileSystem]) -> None:
    remote.contents["a.bin"] = bytes(range(200))
    (file,) = find_files("flaky://a.bin", "k")
    with file.open() as opened:
        assert opened.seek(-10, os.SEEK_END) == 190 and opened.read(3) == bytes([190, 191, 192])
        assert opened.seek(5) == 5 and opened.read(1) == bytes([5])


def test_remote_parquet_and_gzip(remote: type[FlakyFileSystem], tmp_path: Path) -> None:
    from mf_train.data.text.store import open_documents

    texts = [f"document {number}" for number in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    remote.contents["d/a.parquet"] = (tmp_path / "a.parquet").read_bytes()
    remote.contents["d/b.jsonl.gz"] = gzip.compress(json_lines(texts))
    remote.faults = [TimeoutError("once")]
    documents = open_documents(find_files("flaky://d", "k"), "text", "raise", tmp_path / "cache", "d", "k")
    assert [documents.text(i).decode() for i in range(len(documents))] == texts * 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_machine_that_fails_is_not_skipped(
    name: str, remote: type[FlakyFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other than damage: what is read must not depend on the network's weather."""
    from mf_train.data.text.store import open_documents

    monkeypatch.setattr(remote_module, "WAITS", (0.0,))
    monkeypatch.setattr(files_module, "REMOTE_BLOCK_BYTES", 1000)
    texts = [os.urandom(200).hex() for _ in range(100)]
    lines = json_lines(texts)
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    remote.contents[name] = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
    }[name]
    found = find_files(f"flaky://{name}", "k")
    for fault, raised, message in [
        (OSError("503"), OSError, "503 .tried 2 times.*"),
        (OSError(errno.ENOMEM, "no memory"), OSError, "no memory.*"),
        (OSError(errno.EMFILE, "Too many open files"), OSError, "Too many open files.*"),
        (PermissionError("ExpiredToken"), UserError, ""),
        (PermissionError(errno.EACCES, "denied"), UserError, ""),
        (not_found(DriverError("Forbidden", 403)), UserError, ""),
        (not_found(DriverError("Server disconnected")), OSError, "DriverError: Server disc.*"),
    ]:
        remote.faults = [1000, 1000, *[fault] * 100]
        with pytest.raises(raised, match=f"{message}flaky://{name}"):
            open_documents(found, "text", "skip", tmp_path / "cache", "d", "k")
    remote.faults = []
    documents = open_documents(found, "text", "skip", tmp_path / "cache", "d", "k")
    assert [documents.text(i).decode() for i in range(len(documents))] == texts
