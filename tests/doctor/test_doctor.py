"""`memoryformer doctor`: its output on this machine, and what it advises on others."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from mf_train.doctor import doctor
from mf_train.doctor.doctor import suggestions
from mf_train.kernels import cpu
from tests.processes import run_python


def test_the_command() -> None:
    lines = run_python("from mf_train.cli import main; main(['doctor'])").splitlines()
    blank = lines.index("")
    names = [line[:14].rstrip() for line in lines[:blank]]
    assert names[:5] == ["versions", "processors", "memory", "GPUs", "threads"]
    assert f"python {sys.version.split()[0]}" in lines[0]
    assert re.search(r"[1-9]\d*\.\d GB/s", lines[names.index("memory copy")])
    assert re.search(r"\d\.\d ms .*, \d+\.\d times", lines[names.index("memory layer")])
    after = lines[blank + 1 :]
    assert after == ["Nothing to change was found."] or (after[0].startswith("What") and len(after) > 1)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One where nothing is to be changed: 4 processors that nobody else uses, a library, no driver."""
    monkeypatch.setattr(doctor, "usable_processors", lambda: 4)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: None)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "busy_processors", lambda: 0.4)
    monkeypatch.setattr(doctor, "compiler_problem", lambda environment: None)
    monkeypatch.setattr(cpu, "reason", lambda: "")
    monkeypatch.setattr(doctor, "has_triton", lambda: True)
    return tmp_path


def test_a_machine_that_is_well(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(suggestions(4, False, {})) == []
    assert list(suggestions(4, True, {})) == []
    monkeypatch.setattr(doctor, "busy_processors", lambda: None)
    assert list(suggestions(1, False, {})) == []


def test_no_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "reason", lambda: "there is no compiler g++ on the PATH")
    (line,) = suggestions(4, False, {})
    assert line.endswith("because there is no compiler g++ on the PATH: install g++")


def test_more_threads_than_processors(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = suggestions(5, False, {})
    assert "4 may be used" in line and line.endswith("OMP_NUM_THREADS=4")
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 3.5)
    (line,) = suggestions(64, False, {})
    assert "gives time for 3.5" in line and line.endswith("OMP_NUM_THREADS=4")


def test_busy_neighbours(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "busy_processors", lambda: 2.1)
    (line,) = suggestions(4, False, {"OMP_WAIT_POLICY": "active"})
    assert "2.1 of 4" in line
    assert line.endswith("OMP_WAIT_POLICY=passive (training in one process does so by itself)")
    assert list(suggestions(4, False, {"OMP_WAIT_POLICY": "PASSIVE"})) == []


def test_gpus(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "version").write_text("NVRM version")
    assert list(suggestions(4, True, {})) == []
    (line,) = suggestions(4, False, {})
    assert "CUDA build" in line
    monkeypatch.setattr(doctor, "compiler_problem", lambda environment: "has no C compiler")
    assert list(suggestions(4, True, {})) == ["this machine has no C compiler"]
    monkeypatch.setattr(doctor, "has_triton", lambda: False)
    (line,) = suggestions(4, True, {})
    assert line.endswith("install triton")
