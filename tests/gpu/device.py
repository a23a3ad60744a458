"""The device that this folder's tests run on, and what has to be installed for them.

`MF_GPU_TESTS=cpu` rehearses them on the CPU: kernels in Triton's interpreter, processes over gloo. It shows that the
tests themselves work. `MF_GPU_TESTS=cuda` makes a GPU that is not found an error. Unset: skipped where there is none.
"""

from __future__ import annotations

import os

import pytest
import torch

from benchmarks.gpu.parts import is_installed

NO_GPU = "torch finds no GPU (MF_GPU_TESTS=cpu rehearses these tests on the CPU)"


def device_or_skip() -> str:
    """ "cuda" or "cpu". Skips the module that asks where there is no GPU and no rehearsal was asked for."""
    wanted = os.environ.get("MF_GPU_TESTS", "")
    if wanted not in ("", "cpu", "cuda"):
        raise pytest.UsageError(f"MF_GPU_TESTS is {wanted!r}: it must be cpu, cuda or unset")
    if wanted == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if wanted == "cuda":
            raise pytest.UsageError(
                f"MF_GPU_TESTS is cuda, and torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU"
            )
        pytest.skip(NO_GPU, allow_module_level=True)
    return "cuda"


def skip_without(*packages: str) -> None:
    """Skips the module that asks where a package is not installed."""
    missing = [name for name in packages if not is_installed(name)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        pytest.skip(f"{' and '.join(missing)} {verb} not installed", allow_module_level=True)


def num_devices(device: str) -> int:
    """Processes that can have a device each: GPUs; on the CPU two, to rehearse both degrees."""
    return torch.cuda.device_count() if device == "cuda" else 2
