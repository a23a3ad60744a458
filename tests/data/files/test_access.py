"""What passes is tried again, what does not is raised at once; descriptors are few."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_train.data.files.access import OpenFiles, read_exactly, read_into, with_retries
from mf_train.errors import UserError
from tests.processes import run_python


def failing(error: OSError, times: int) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def action() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return action, calls


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O"), TimeoutError("slow"), OSError("HTTP 503")])
def test_what_passes_is_tried_again(error: OSError) -> None:
    action, calls = failing(error, 3)
    assert with_retries(action, "a.bin", waits=(0, 0, 0)) == "done" and len(calls) == 4
    action, calls = failing(error, 4)
    with pytest.raises(OSError, match=r"tried 4 times.*'a\.bin'"):
        with_retries(action, "a.bin", waits=(0, 0, 0))
    assert len(calls) == 4


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("gone"),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.ENOSPC, "full"),
        IsADirectoryError(errno.EISDIR, "folder"),
    ],
)
def test_what_stays_is_raised_at_once(error: OSError) -> None:
    action, calls = failing(error, 1)
    with pytest.raises(type(error)) as caught:
        with_retries(action, "a.bin")
    assert len(calls) == 1
    assert error.errno is None or caught.value.filename == "a.bin"


def test_reading_exactly(tmp_path: Path) -> None:
    path = str(tmp_path / "a.bin")
    content = os.urandom(100_000)
    Path(path).write_bytes(content)
    files = OpenFiles()
    assert read_exactly(files, path, 17, 50_000) == content[17:50_017]
    assert read_exactly(files, path, 100_000, 0) == b""
    buffer = bytearray(100)
    read_into(files, path, memoryview(buffer)[10:60], 99_950)
    assert bytes(buffer) == bytes(10) + content[-50:] + bytes(40)
    with pytest.raises(UserError, match=r"a\.bin ended early: .* 99950 to 100001 .* it was 100000 bytes"):
        read_exactly(files, path, 99_950, 51)
    with pytest.raises(FileNotFoundError, match=r"b\.bin"):
        read_exactly(files, str(tmp_path / "b.bin"), 0, 1)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        read_exactly(files, str(tmp_path), 0, 1)


def test_few_files_stay_open(tmp_path: Path) -> None:
    files = OpenFiles(limit=3)
    for number in range(10):
        (tmp_path / str(number)).write_bytes(bytes([number]))
    before = len(os.listdir("/proc/self/fd"))
    for number in [*range(10), 0, 9, 9, 1]:
        assert read_exactly(files, str(tmp_path / str(number)), 0, 1) == bytes([number])
    assert len(os.listdir("/proc/self/fd")) == before + 3
    first = files.descriptor(str(tmp_path / "9"))
    assert files.descriptor(str(tmp_path / "9")) == first
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_low_limit_of_descriptors_is_kept(tmp_path: Path) -> None:
    """More files than the process may open, though OpenFiles would keep them all."""
    for number in range(100):
        (tmp_path / str(number)).write_bytes(b"x")
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from mf_train.data.files.access import OpenFiles, read_exactly
files = OpenFiles(limit=1000)
for number in range(100):
    assert read_exactly(files, "{tmp_path}/" + str(number), 0, 1) == b"x"
print("ok")
"""
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 40
    assert run_python(code) == "ok\n"
