"""Remote token shards are copied once, whole, with what belongs to them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from mf_train.data.files import access as remote_module
from mf_train.data.files.input_files import find_files
from mf_train.data.shards.fetch import local_files
from mf_train.errors import UserError
from tests.data.remote import FlakyFileSystem


def test_many_files(remote: type[FlakyFileSystem], tmp_path: Path) -> None:
    for number in range(7):
        remote.contents |= {f"t/{number}.bin": b"%d" % number, f"t/{number}.idx": b"index"}
    (tmp_path / "local.bin").write_bytes(b"local")
    files = find_files("flaky://t", "k") + find_files(str(tmp_path / "local.bin"), "k")
    paths = local_files(files, tmp_path / "cache")
    assert [path.read_bytes() for path in paths] == [b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"local"]
    assert paths[-1] == tmp_path / "local.bin"


def test_remote_shards_are_fetched_once(remote: type[FlakyFileSystem], tmp_path: Path) -> None:
    remote.contents |= {"t/x.bin": b"tokens", "t/x.idx": b"index", "t/manifest.json": b"{}"}
    (file,) = find_files("flaky://t/x", "k")
    path = local_files([file], tmp_path)[0]
    assert path.name == "x.bin" and path.read_bytes() == b"tokens"
    assert path.with_suffix(".idx").read_bytes() == b"index"
    assert sorted(found.name for found in path.parent.iterdir()) == ["manifest.json", "x.bin", "x.idx"]
    reads = len(remote.reads)
    assert local_files([file], tmp_path)[0] == path and len(remote.reads) == reads
    remote.contents["t/x.bin"], remote.versions["t/x.bin"] = b"others", "2"
    (changed,) = find_files("flaky://t/x", "k")
    assert local_files([changed], tmp_path)[0].read_bytes() == b"others"


def test_what_changes_beside_a_shard_is_fetched(remote: type[FlakyFileSystem], tmp_path: Path) -> None:
    """The .idx, and the manifest.json, which may come later."""
    remote.contents |= {"t/x.bin": b"tokens", "t/x.idx": b"index"}
    (file,) = find_files("flaky://t/x", "k")
    assert local_files([file], tmp_path)[0].with_suffix(".idx").read_bytes() == b"index"
    remote.contents["t/x.idx"], remote.versions["t/x.idx"] = b"other", "2"
    path = local_files([file], tmp_path)[0]
    assert path.with_suffix(".idx").read_bytes() == b"other"
    assert not path.with_name("manifest.json").exists()
    remote.contents["t/manifest.json"] = b"{}"
    assert local_files([file], tmp_path)[0].with_name("manifest.json").read_bytes() == b"{}"
    del remote.contents["t/manifest.json"]
    assert local_files([file], tmp_path)[0] == path


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers a URL whose path and query are in `contents`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            content = contents.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        do_HEAD = do_GET  # noqa: N815

    contents: dict[str, bytes] = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.contents = contents  # type: ignore[attr-defined]
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("query", ["", "?download=true", "?key=a/b.idx"])
def test_a_shard_behind_http(query: str, server: Any, tmp_path: Path) -> None:
    """The index and the manifest are asked for with the same query, which is no part of their names here."""
    url = f"http://127.0.0.1:{server.server_port}/t/x.bin{query}"
    server.contents |= {f"/t/x.bin{query}": b"tokens"}
    files = find_files(url, "k")
    with pytest.raises(UserError, match=rf"{re.escape(url)} has no x\.idx beside it"):
        local_files(files, tmp_path)
    server.contents |= {f"/t/x.idx{query}": b"index", f"/t/manifest.json{query}": b"{}"}
    assert find_files(url.replace(".bin", ".idx", 1), "k") == files
    (path,) = local_files(files, tmp_path)
    assert {found.name: found.read_bytes() for found in path.parent.iterdir()} == {
        "x.bin": b"tokens",
        "x.idx": b"index",
        "manifest.json": b"{}",
    }


def test_a_shard_without_its_index_is_refused(remote: type[FlakyFileSystem], tmp_path: Path) -> None:
    remote.contents |= {"t/x.bin": b"tokens", "t/manifest.json": b"{}"}
    (file,) = find_files("flaky://t/x.bin", "k")
    with pytest.raises(UserError, match=r"flaky://t/x\.bin has no x\.idx beside it"):
        local_files([file], tmp_path)
    assert remote.reads == []


def test_a_fetch_that_fails_leaves_nothing(
    remote: type[FlakyFileSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_module, "WAITS", (0.0,))
    remote.contents |= {"t/x.bin": bytes(10_000_000), "t/x.idx": b"index"}
    (file,) = find_files("flaky://t/x", "k")
    remote.faults = [
        1,
        4_000_000,
        OSError("503"),
        OSError("503"),
    ]  # the index whole, then a part of the tokens
    remote.contents["t/x.idx"] = b"i"
    with pytest.raises(OSError, match="503"):
        local_files([file], tmp_path)
    assert [found.name for found in tmp_path.rglob("*") if found.suffix in (".bin", ".tmp")] == []
    assert local_files([file], tmp_path)[0].stat().st_size == 10_000_000
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"the cache .*file.* cannot be used .*: set data.cache"):
        local_files([file], tmp_path / "file")
