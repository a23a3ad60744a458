"""What a node says of itself."""

from __future__ import annotations

import platform
import resource
import shutil
from pathlib import Path

import pytest

import mf_train
from mf_train.launch import machine


def test_versions_name_what_is_there() -> None:
    found = machine.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].startswith("2.")
    assert "kernel" in found


def test_the_digest_changes_with_a_source(tmp_path: Path) -> None:
    package = Path(mf_train.__file__).parent
    copy = shutil.copytree(package, tmp_path / "mf_train", ignore=shutil.ignore_patterns("__pycache__"))
    before = machine.source_digest(copy)
    assert before == machine.source_digest(package)
    (copy / "errors.py").write_text((copy / "errors.py").read_text() + "\n# changed\n")
    assert machine.source_digest(copy) != before


def test_resources_are_those_of_this_machine(tmp_path: Path) -> None:
    found = machine.resources(tmp_path)
    assert 2**28 < found["memory"] < 2**45
    assert abs(found["free"] - shutil.disk_usage(tmp_path).free) < 2**32
    assert found["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def test_a_host_that_does_not_resolve_is_told() -> None:
    assert "no-such-host.invalid" in (machine.name_problem("no-such-host.invalid", gloo=True) or "")


def test_a_missing_compiler_or_header_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    for folder in (empty, full):
        folder.mkdir()
    (full / "clang").write_text("#!/bin/sh\n")
    (full / "clang").chmod(0o755)
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(headers))
    assert "gcc or clang" in (machine.compiler_problem({"PATH": str(empty)}) or "")
    assert "Python.h" in (machine.compiler_problem({"PATH": str(full)}) or "")
    (headers / "Python.h").write_text("")
    assert machine.compiler_problem({"PATH": str(full)}) is None
    own = {"PATH": str(empty), "CC": f"{full / 'clang'} -m64"}
    assert machine.compiler_problem(own) is None
    assert "C compiler (no-cc)" in (machine.compiler_problem({"PATH": str(full), "CC": "no-cc"}) or "")
