"""The processors that a process can use, where control groups limit their time, their name and caches."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mf_train import control_groups, processors
from mf_train.processors import busy_processors, caches, cpu_quota, processor_name, usable_processors


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a machine's control groups, of which a test writes the files; 64 processors may be used."""
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    return tmp_path


def write_quota(folder: Path, most: str, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{most} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{most}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")


def test_without_groups_it_is_the_affinity(groups: Path) -> None:
    assert cpu_quota() is None and usable_processors() == 64
    (groups / "own").write_text("0::/gone\n3:memory:/\n")
    assert cpu_quota() is None and usable_processors() == 64


@pytest.mark.parametrize("version", [1, 2])
def test_the_narrowest_quota_counts(groups: Path, version: int) -> None:
    root, line = (groups, "0::/pod/box") if version == 2 else (groups / "cpu", "4:cpu,cpuacct:/pod/box")
    (groups / "own").write_text(f"3:cpuset:/\n{line}\n")
    write_quota(root / "pod" / "box", "max" if version == 2 else "-1", version)
    write_quota(root / "pod", "250000", version)
    assert cpu_quota() == 2.5 and usable_processors() == 3
    write_quota(root / "pod" / "box", "20000", version)
    assert cpu_quota() == 0.2 and usable_processors() == 1
    write_quota(root / "pod" / "box", "9900000", version)
    write_quota(root / "pod", "8800000", version)
    assert usable_processors() == 64


def test_what_others_keep_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two processors, of four, that may be used: three quarters of one and a tenth of the other."""
    monkeypatch.setattr(processors, "STATISTICS", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 2})
    assert busy_processors(0) is None
    head = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    states = [
        f"{head}cpu1 100 0 50 700 30 0 0 0 0 0\ncpu2 5 0 5 90 0 0 0 0 0 0\ncpu3 0 0 0 0 0 0 0 0 0 0\nintr 5\n",
        f"{head}cpu1 160 5 60 720 35 0 0 0 0 0\ncpu2 5 0 14 171 0 0 0 0 0 0\ncpu3 99 0 0 0 0 0 0 0 0 0\nintr 9\n",
    ]
    (tmp_path / "stat").write_text(states[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: (tmp_path / "stat").write_text(states[1]))
    assert busy_processors() == pytest.approx(0.75 + 0.1)
    assert busy_processors() is None  # nothing has passed


def test_the_processors_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "INFORMATION", tmp_path / "cpuinfo")
    assert processor_name() == "unknown processor"
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel\t\t: 143\nmodel name\t: A: 3 GHz\nmodel name\t: B\n"
    )
    assert processor_name() == "A: 3 GHz"


def write_cache(folder: Path, kind: str, level: int, size: str, shared: str) -> None:
    folder.mkdir(parents=True)
    for name, text in (("type", kind), ("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
        (folder / name).write_text(f"{text}\n")


def test_caches(groups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "CACHES", groups)
    assert caches() == {}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 7})
    folder = groups / "cpu5" / "cache"
    write_cache(folder / "index0", "Data", 1, "32K", "5")
    write_cache(folder / "index1", "Instruction", 1, "64K", "5")
    write_cache(folder / "index2", "Unified", 2, "1280K", "4-5,132-133")
    write_cache(folder / "index3", "Unified", 3, "36M", "0-31")
    (folder / "index4").mkdir()  # a system that does not say everything
    assert caches() == {"L1": (32 << 10, 1), "L2": (1280 << 10, 4), "L3": (36 << 20, 32)}
