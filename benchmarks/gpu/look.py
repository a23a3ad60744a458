"""What is here, in one JSON object on standard output: the device, the versions, the compilers, and what is missing.

Run in a process of its own, so that nothing of CUDA is in the process that starts the parts.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.gpu.parts import is_installed, missing_packages
from mf_train.launch.machine import compiler_problem
from mf_train.text import first_line

_PACKAGES = ("torch", "triton", "transformers", "deepspeed")


def look() -> dict[str, Any]:
    """Facts about this machine.

    "problem" is why nothing can run on a GPU here, and "compiler" why Triton cannot compile; "" where they can.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES if is_installed(name)},
        "missing": missing_packages(),
        "compiler": compiler_problem() or "",
        "nvcc": shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"),
        "driver": driver(),
    }
    if "torch" not in found["packages"]:
        return found | {"problem": "torch is not installed", "device": None}
    device, problem = find_device()
    return found | {"device": device, "problem": problem}


def find_device() -> tuple[dict[str, Any] | None, str]:
    """The first GPU, if it computes, and else the reason in one line."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return None, f"torch {torch.__version__} is built without CUDA: install its CUDA build"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
        total = float(torch.ones(1000, device="cuda").sum())
        if total != 1000:
            return None, f"the GPU adds a thousand ones to {total}"
    except (RuntimeError, AssertionError) as error:
        return None, first_line(error)[:300]
    properties = torch.cuda.get_device_properties(0)
    device = {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": properties.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "cuda": torch.version.cuda,
    }
    return device, ""


def driver() -> str | None:
    """The driver's version as nvidia-smi says it."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    json.dump(look(), sys.stdout)
