"""Files that are there as a whole or not at all, and their errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mf_train.files import path_in_errors, remove_folder, replacing, user_cache, write_whole


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_whole(path, b"old", "0123")
    script = (
        "import resource, signal, sys; from pathlib import Path; from mf_train.files import write_whole\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4))\n"
        "write_whole(Path(sys.argv[1]), b'12345', '4567')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert "File too large" in done.stderr and ".latest.4567" in done.stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "table"
    write_whole(path, b"old")
    with pytest.raises(KeyError), replacing(path) as file:
        file.write(b"half")
        raise KeyError("what the block was about to write")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_an_error_keeps_the_name_that_it_has(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), path_in_errors(tmp_path / "this"):
        (tmp_path / "other").read_bytes()
    with pytest.raises(OSError, match="this"), path_in_errors(tmp_path / "this"):
        raise OSError(28, "No space left on device")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache() == Path("/somewhere/mf_train")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert user_cache() == Path.home() / ".cache" / "mf_train"


def test_removing_what_is_gone(tmp_path: Path) -> None:
    remove_folder(tmp_path / "nothing")
    (tmp_path / "something" / "inside").mkdir(parents=True)
    remove_folder(tmp_path / "something")
    assert not list(tmp_path.iterdir())
