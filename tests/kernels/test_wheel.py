"""Wheels with the C++ operation compiled, installed where there is neither a compiler nor a cache."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from mf_train.kernels import build, cpu, wheel
from tests.training.runs import REPOSITORY

LOOK_UP = """
import torch
from mf_train.kernels import cpu, describe, hash_codes, lookup
x, tables = torch.randn(70, 32, requires_grad=True), torch.randn(4, 256, 24, requires_grad=True)
def gradients(backend):
    y = lookup(*hash_codes(x, 4, backend=backend), tables, backend=backend)
    return [y, *torch.autograd.grad(y.square().sum(), [x, tables])]
for found, expected in zip(gradients("auto"), gradients("composition"), strict=True):
    torch.testing.assert_close(found, expected)
print(describe(torch.device("cpu")))
print(cpu.library()._name)
"""


def make(machine: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "mf_train.kernels.wheel", "--machines", machine, "--output", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    assert done.stdout.splitlines()[-1] == str(made)
    assert made.name.endswith(f"-py3-none-manylinux_2_17_{machine}.whl")
    return made


def libraries(made: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(made) as files:
        names = [name for name in files.namelist() if name.endswith(".so")]
        return {Path(name).name: files.read(name) for name in names}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_an_installed_wheel_needs_no_compiler(tmp_path: Path) -> None:
    made = make(platform.machine(), tmp_path / "dist")
    assert len(libraries(made)) == len(wheel.MACHINES[platform.machine()])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        made,
    ]
    subprocess.run(install, check=True)
    (packages,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    (packages / "torch.pth").write_text(
        sysconfig.get_path("purelib")
    )  # torch and numpy, and no more of the project
    for capability in ("", "avx2") if platform.machine() == "x86_64" else ("",):
        variables = {"PATH": "/nowhere", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
        variables |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        done = subprocess.run(
            [python, "-c", LOOK_UP], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        kind, library = done.stdout.splitlines()
        assert kind.startswith("C++ operation")
        assert Path(library).parent == packages / "mf_train" / "kernels" / "prebuilt"
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(wheel.tool("aarch64", "g++")) is None, reason="no compiler for Arm")
def test_a_wheel_for_arm(tmp_path: Path) -> None:
    ((name, content),) = libraries(make("aarch64", tmp_path)).items()
    assert name == build.file_name(*cpu.recipe("neon"), "aarch64")
    assert content[:4] == b"\x7fELF" and int.from_bytes(content[18:20], "little") == 183  # EM_AARCH64


def test_without_a_compiler_nothing_is_left(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "mf_train", tmp_path / "mf_train")  # nothing was compiled beside this copy
    for name in wheel.BESIDE:
        shutil.copy(REPOSITORY / name, tmp_path)
    command = [sys.executable, "-m", "mf_train.kernels.wheel", "--output", str(tmp_path / "dist")]
    variables = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [*command, "--machines", platform.machine()],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"no wheel for {platform.machine()}: there is no compiler g++ on the PATH"
    ]
    assert not (tmp_path / "dist").exists()
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("there is no ") == len(wheel.MACHINES)


def test_a_library_of_other_sources_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "prebuilt").mkdir()
    (source := tmp_path / "a.cpp").write_text("1")
    asked = []

    def commands(output: Path) -> build.Commands:
        asked.append(output)
        return [[["cp", str(source), str(output)]]]

    right = build.PREBUILT / build.file_name("a", [source], ["-O3"], platform.machine())
    right.touch()
    assert build.compile_once("a", [source], ["-O3"], commands) == right and not asked
    assert build.compile_once("a", [source], ["-O2"], commands).parent != build.PREBUILT
    source.write_text("2")
    assert build.compile_once("a", [source], ["-O3"], commands).read_text() == "2"
    assert len(asked) == 2
