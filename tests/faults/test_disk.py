"""A full disk and a read-only folder: real mounts."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Drill, MakeRun
from tests.faults.drill import Moment, Start, list_steps, random_moments

pytestmark = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root"),
]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`mount(place, "-t", "tmpfs", "tmpfs")`; unmounted again in the end."""
    places: list[Path] = []

    def do(place: Path, *arguments: str) -> None:
        subprocess.run(["mount", *arguments, str(place)], check=True)
        if "remount" not in ",".join(arguments):
            places.append(place)

    yield do
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def fill(folder: Path) -> Path:
    """Take the last byte of a file system; returns the file to delete to make room again."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return ballast


def assert_one_line(start: Start, *said: str) -> None:
    """It ended with an error of one line that says each of `said`, and without a traceback of its own."""
    (line,) = start.complaints()
    assert all(word in line for word in said), line
    assert "mf_train/" not in start.errors.read_text(), start.text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_disk_too_small(
    processes: int, mount: Callable[..., None], make_run: MakeRun, tmp_path: Path, drill: Drill
) -> None:
    """Room for two checkpoints and a half where three are kept; then the disk grows."""
    drill.case("full disk: the third checkpoint does not fit")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=82m", "tmpfs")
    run = make_run(processes, 12, disk / "run")
    start = run.start()
    assert start.end() == 1, start.text()
    assert_one_line(start, "No space left", str(run.checkpoints), "step-000000004")
    assert list_steps(run.checkpoints) == [2, 4]
    drill.struck(run.check_folder(saving=True))
    used = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    assert used < 75 << 20, "what could not be saved is still there"
    mount(disk, "-o", "remount,size=300m")
    drill.recovered(run.finish())


def test_a_disk_that_fills_up(
    mount: Callable[..., None], make_run: MakeRun, tmp_path: Path, drill: Drill
) -> None:
    """Filled to the last byte at random moments and kept so; a start on a full disk harms nothing either."""
    drill.case("full disk at random moments")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=400m", "tmpfs")
    run = make_run(2, 60, disk / "run")
    for moment in random_moments(drill.random, 4):
        start = run.start()
        moment.wait(start)
        saving, struck = start.saving(), time.monotonic()
        while start.process.poll() is None:
            ballast = fill(disk)
            time.sleep(0.01)
        status = start.end()
        drill.failed(time.monotonic() - struck)
        print(f"{start.errors.name}: {moment}{', saving' if saving else ''}: status {status}")
        assert status == 1 and "No space left" in start.complaints()[0], start.text()
        assert len(start.complaints()) == 1, start.text()
        loss = run.check_folder(saving=True)
        drill.struck(loss)
        again = run.start()
        assert again.end() == 1, again.text()
        assert_one_line(again, "No space left", str(run.folder))
        assert run.check_folder(saving=True).again <= loss.again
        ballast.unlink()
    drill.recovered(run.finish())


@pytest.mark.parametrize("processes", [1, 2])
def test_checkpoints_become_read_only(
    processes: int, mount: Callable[..., None], make_run: MakeRun, tmp_path: Path, drill: Drill
) -> None:
    drill.case("the checkpoints' folder becomes read-only")
    run = make_run(processes, 60)
    locked = tmp_path / "locked"
    locked.mkdir()
    for moment in (
        Moment("step", 5, drill.random.uniform(0, 0.2)),
        Moment("saving", 2, drill.random.uniform(0, 0.1)),
    ):
        start = run.start()
        moment.wait(start)
        mount(locked, "--bind", str(run.checkpoints))
        mount(locked, "-o", "remount,ro,bind")  # nothing is open for writing through this mount
        mount(run.checkpoints, "--bind", str(locked))
        assert start.end() == 1, start.text()
        assert_one_line(start, "Read-only file system", str(run.checkpoints))
        again = run.start()
        assert again.end() in (1, 2), again.text()
        assert_one_line(again, str(run.folder))
        loss = run.check_folder(saving=True)
        for place in (run.checkpoints, locked):
            subprocess.run(["umount", "-l", str(place)], check=True)
        drill.struck(loss)
    drill.recovered(run.finish())


def test_a_folder_that_is_read_only_from_the_start(
    mount: Callable[..., None], make_run: MakeRun, tmp_path: Path, drill: Drill
) -> None:
    drill.case("the run's folder cannot be made")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "ro", "tmpfs")
    run = make_run(2, 12, disk / "run")
    start = run.start()
    assert start.end() in (1, 2), start.text()
    assert_one_line(start, "Read-only file system", str(run.folder))
    mount(disk, "-o", "remount,rw,size=300m")
    drill.struck(run.check_folder())
    drill.recovered(run.finish())
