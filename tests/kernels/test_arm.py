"""The C++ operation on Arm, compiled for it here and run under an emulator: x86's results to the last bit.

What moments in fewer bytes are updated by (adamw.cpp) is compiled alone: the driver has no case of it.

Needs root's `apt-get install g++-aarch64-linux-gnu qemu-user` on x86.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from mf_train.kernels import build, cpu

FOLDER = Path(__file__).parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="Arm is compared with x86"),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason="no compiler or emulator for Arm"
    ),
]


def compiled(compiler: str, instruction_set: str, driver: str, folder: Path) -> Path:
    """A program of the driver and the sources, with the flags of the library."""
    flags = [*cpu.FLAGS, *cpu.INSTRUCTION_SETS[instruction_set], f"-I{build.SOURCES}", "-static"]
    sources = [FOLDER / driver, *sorted(build.SOURCES.glob("*.cpp"))]
    program = folder / f"{driver}-{instruction_set}"
    subprocess.run([compiler, *flags, *sources, "-o", program], check=True)
    return program


def said(command: list[object]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_operation_has_the_bits_of_x86(tmp_path: Path) -> None:
    arm = compiled(COMPILER, "neon", "sanitize_driver.cpp", tmp_path)
    x86 = compiled("g++", "avx2", "sanitize_driver.cpp", tmp_path)
    expected = said([x86, 40, "digests"])
    assert expected.count("\n") == 13 and expected.endswith("done\n")
    assert said([EMULATOR, arm, 40, "digests"]) == expected


def test_the_decoder_gives_each_caller_its_own(tmp_path: Path) -> None:
    """Random models, batches and threads, four callers at a time on one model."""
    assert said([EMULATOR, compiled(COMPILER, "neon", "decode_driver.cpp", tmp_path), 6]) == "done\n"
