"""Remote token shards are copied once, whole, with what belongs to them."""

from __future__ import annotations

from pathlib import Path

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
