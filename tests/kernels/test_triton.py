"""The Triton kernels: their files of cases in Triton's interpreter, and the compiler's result for sm_90.

On a GPU: tests/gpu/test_kernels.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

FOLDER = Path(__file__).parent
CASES = ("triton_cases.py", "triton_loss_cases.py", "triton_adamw_cases.py", "triton_rotary_cases.py")
OTHER_TYPES = (("fp32", "i16"), ("fp16", "i32"), ("fp64", "i64"))
COMPILE = FOLDER / "triton_compile.py"
REPOSITORY = FOLDER.parents[1]


def run(arguments: list[str], cache: Path, interpret: bool) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET once, when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]


@pytest.mark.parametrize(
    ("cases", "marked"),
    [
        *((cases, "not slow") for cases in CASES),
        *(pytest.param(cases, "slow", marks=pytest.mark.slow) for cases in CASES[:3]),  # the last has none
    ],
)
def test_cases(cases: str, marked: str, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-x", "-m", marked]
    run(["-m", "pytest", *options, str(FOLDER / cases)], tmp_path, interpret=True)


@pytest.mark.parametrize(
    ("value", "codes"),
    [
        ("bf16", "u8"),
        *(pytest.param(*types, marks=pytest.mark.slow) for types in OTHER_TYPES),
    ],
)
def test_compiles_for_sm_90(value: str, codes: str, tmp_path: Path) -> None:
    run([str(COMPILE), value, codes], tmp_path, interpret=False)
