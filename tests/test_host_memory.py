"""The memory that a process can still have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mf_train import control_groups, host_memory
from mf_train.host_memory import available_memory
from tests.processes import run_python

MEMORY = Path("/sys/fs/cgroup/memory")
PRINT = "from mf_train.host_memory import available_memory; print(available_memory())"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 GiB left, of whose control groups a test writes the files."""
    (tmp_path / "meminfo").write_text("MemTotal: 99999999 kB\nMemAvailable:    8388608 kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    return tmp_path


def write_group(folder: Path, limit: int | str, used: int, cached: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 17\n{names[2]} {cached}\nactive_file 3\n")


def test_without_groups_it_is_the_machines(system: Path) -> None:
    assert available_memory() == 2**33
    (system / "own").write_text("0::/gone\n3:cpuset:/\n")
    assert available_memory() == 2**33


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_group_counts(system: Path, version: int) -> None:
    """A job's limit around a step without one; what files take that can be read again is left."""
    root, line = (system, "0::/job/step") if version == 2 else (system / "memory", "4:cpu,memory:/job/step")
    (system / "own").write_text(f"3:cpuset:/\n{line}\n")
    write_group(root / "job", 2**31, 2**30, 2**29, version)
    unlimited = "max" if version == 2 else 2**63 - 4096
    write_group(root / "job" / "step", unlimited, 2**30, 2**29, version)
    assert available_memory() == 2**31 - 2**30 + 2**29
    write_group(root / "job" / "step", 2**20, 2**21, 0, version)
    assert available_memory() == 0


@pytest.mark.skipif(not os.access(MEMORY, os.W_OK), reason="needs root and control groups of version 1")
def test_a_real_group() -> None:
    group = MEMORY / f"memoryformer-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(2**28))
    except OSError as error:
        pytest.skip(f"no control group can be made: {error.strerror}")
    try:
        enter = f"open('{group}/cgroup.procs', 'w').write('0')\n"
        found = int(run_python(enter + PRINT))
    finally:
        group.rmdir()
    assert 2**28 - 2**26 < found < 2**28
