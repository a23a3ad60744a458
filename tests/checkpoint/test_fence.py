"""Older starts of a run are shut out, and no folder is ever there by halves under its own name."""

from __future__ import annotations

import os
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from mf_train.checkpoint.fence import Fence, claim, set_aside
from mf_train.checkpoint.layout import list_checkpoints
from mf_train.errors import TrainingError


def unfinished(folder: Path) -> Path:
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345")
    return folder


def test_the_newest_start_has_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    old = claim(folder)
    old.check()
    written = unfinished(old.partial(200))
    new = claim(folder)
    new.check()
    with pytest.raises(
        TrainingError, match=rf"newer start .* \(process {os.getpid()} on \S+, 2.*\) has taken"
    ):
        old.check()
    with pytest.raises(FileNotFoundError):  # a check that was made just before does not help
        os.rename(written, folder / "step-000000200")
    assert not list_checkpoints(folder) and [path.name for path in folder.iterdir()] == [".writer"]
    assert old.partial(200) != new.partial(200)


def test_a_start_leaves_what_is_complete(tmp_path: Path) -> None:
    for name in ("step-000000100", ".step-000000200.partial-0123", ".removed-9", "step-000000300.damaged"):
        unfinished(tmp_path / name)
    (tmp_path / "latest").write_text("step-000000100\n")
    (tmp_path / ".latest.0123").write_text("step-000000200\n")
    claim(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"step-000000100", "step-000000300.damaged", "latest", ".writer"}


def test_a_lost_or_damaged_token_ends_the_run(tmp_path: Path) -> None:
    fence = claim(tmp_path)
    (tmp_path / ".writer").write_text("{")
    with pytest.raises(TrainingError, match="newer start"):
        fence.check()
    (tmp_path / ".writer").unlink()
    with pytest.raises(TrainingError, match=r"\.writer is gone"):
        fence.check()


def test_of_two_starts_at_once_one_has_the_folder(tmp_path: Path) -> None:
    for attempt in range(20):
        folder = tmp_path / str(attempt)
        fences: list[Fence] = []

        def start(folder: Path = folder, fences: list[Fence] = fences) -> None:
            with suppress(TrainingError):
                fences.append(claim(folder))

        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        allowed = 0
        for fence in fences:
            try:
                fence.check()
                allowed += 1
            except TrainingError:
                pass
        assert allowed == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_an_older_start_filled(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=True)
    try:
        old = unfinished(claim(tmp_path).partial(200))
        with pytest.raises(OSError, match="No space left"):
            (old / "weights").write_bytes(bytes(1 << 20))
        claim(tmp_path).check()
        assert [path.name for path in tmp_path.iterdir()] == [".writer"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_setting_aside_never_overwrites(tmp_path: Path) -> None:
    names = [set_aside(unfinished(tmp_path / "step-000000100"), "damaged").name for _ in range(3)]
    assert names == [f"step-000000100.damaged{end}" for end in ("", "-2", "-3")]
    assert not list_checkpoints(tmp_path)
