"""Which implementation runs: C++ on CPUs, Triton on GPUs, torch operations everywhere else.

A backend is a module with `hash_codes`, `hash_codes_backward`, `lookup`, `lookup_backward`, `lookup_int8` and
`column_sums`, called as `composition`'s are.
"""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch
from torch import Tensor

from . import composition, cpu, cpu_adamw, cpu_loss, cpu_norm
from .build import UnsupportedError

_chosen = "auto"  # what `choose_backend` was told last

BACKENDS = ("auto", "composition", "cpu", "triton", "cuda", "reference")
CPU_DTYPES = (torch.float32, torch.bfloat16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_backend(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Decide what "auto" is in this process from here on, on `device` and in `dtype`: one of BACKENDS but "reference".

    "composition" takes the place of every kernel, those of norms, loss, rotation, counts and AdamW too. "cpu" and
    "triton" are what "auto" takes where they run; "cuda" is Triton but for the lookups.

    Raises UnsupportedError where it cannot run there, with the reason.
    """
    global _chosen
    if name not in ("auto", "composition") and (problem := _problem(name, device, [dtype])):
        raise UnsupportedError(problem)
    _chosen = name


def find_backend(name: str, *tensors: Tensor) -> ModuleType:
    """The backend `name` for floating-point tensors of one device; "auto" is the fastest that takes them, or what
    `choose_backend` says.

    Raises UnsupportedError where the one asked for cannot run here or does not take them.
    """
    device, dtypes = tensors[0].device, [tensor.dtype for tensor in tensors]
    if name == "composition" or (name == "auto" and _chosen == "composition"):
        return composition
    if name == "auto":
        if device.type == "cpu" and all(dtype in CPU_DTYPES for dtype in dtypes):
            return cpu if cpu.library() is not None else _composition_instead(cpu.reason())
        if device.type == "cuda" and all(dtype in GPU_DTYPES for dtype in dtypes) and has_triton():
            return _cuda() if _chosen == "cuda" else _triton()
        return composition
    problem = _problem(name, device, dtypes)
    if problem:
        raise UnsupportedError(
            f"backend {name!r} cannot be used: {problem}; leave the choice to backend='auto'"
        )
    return cpu if name == "cpu" else _triton() if name == "triton" else _cuda()


def fast_norm(x: Tensor) -> ModuleType | None:
    """The steps of a norm in C++ or Triton, where they run for x; the others are mf_train/model/norm_steps.py."""
    return cpu_norm if _runs_in_c(x) else _triton_steps("norm") if _runs_in_triton(x) else None


def fast_loss(logits: Tensor) -> ModuleType | None:
    """The steps of the cross-entropy in C++ or Triton, where they run for logits; else mf_train/model/loss_steps.py."""
    return cpu_loss if _runs_in_c(logits) else _triton_steps("loss") if _runs_in_triton(logits) else None


def fast_rotary(q: Tensor) -> ModuleType | None:
    """The rotation of queries and keys in Triton, where it runs for q; else mf_train.model.attention.rotary."""
    return _triton_steps("rotary") if _runs_in_triton(q) else None


def fast_counting(counts: Tensor) -> ModuleType | None:
    """`count_codes` in C++ or Triton, where it runs for counts [K, rows]; else counting.py has it."""
    if counts.is_cpu:
        return cpu if uses_c() else None
    if not (counts.is_cuda and uses_triton(counts.device)):
        return None
    grouping = _triton_steps("grouping")
    return grouping if counts.shape[1] <= grouping.MAX_COUNTED_ROWS else None


def fast_adamw(gradient: Tensor) -> ModuleType | None:
    """AdamW over compact numbers in C++ or Triton, where it runs; else mf_train/parallel/adamw.py has it."""
    return (
        cpu_adamw if _runs_in_c(gradient) else _triton_steps("adamw") if _runs_in_triton(gradient) else None
    )


def _runs_in_c(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in CPU_DTYPES and not torch.compiler.is_compiling() and uses_c()


def _runs_in_triton(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in GPU_DTYPES and not torch.compiler.is_compiling() and uses_triton(x.device)


def uses_c() -> bool:
    """Whether "auto" is the C++ operation for tensors of a CPU, in the dtypes that it takes."""
    return _chosen != "composition" and cpu.library() is not None


def uses_triton(device: torch.device) -> bool:
    """Whether "auto" is Triton for tensors of a device, in the dtypes that it takes."""
    return _chosen != "composition" and device.type == "cuda" and has_triton()


def describe(device: torch.device) -> str:
    """What "auto" runs on a device, and why not something faster: one line for a log."""
    if _chosen == "composition":
        return "torch operations, slower: kernels.backend is composition"
    if uses_triton(device):
        return "Triton kernels" + (", lookups in CUDA C++" if _chosen == "cuda" else "")
    if device.type == "cpu" and uses_c():
        return f"C++ operation ({cpu.instruction_set().upper()})"
    why = {"cpu": cpu.reason, "cuda": lambda: "triton is not installed"}.get(device.type)
    return "torch operations" + (f", slower: {why()}" if why else "")


def _problem(name: str, device: torch.device, dtypes: list[torch.dtype]) -> str:
    """Why a backend cannot compute with tensors of this device and these dtypes; "" where it can."""
    wanted, known = {
        "cpu": ("cpu", CPU_DTYPES),
        "triton": ("cuda", GPU_DTYPES),
        "cuda": ("cuda", CPU_DTYPES),
    }[name]
    if device.type != wanted:
        return f"it computes on {'GPUs' if wanted == 'cuda' else 'CPUs'}, and the tensors are on {device}"
    if wrong := [dtype for dtype in dtypes if dtype not in known]:
        return f"it does not compute in {wrong[0]}"
    if name == "cpu":
        return cpu.reason()
    if not has_triton():
        return "triton is not installed"
    return _cuda().unavailable_reason(device) if name == "cuda" else ""


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _composition_instead(reason: str) -> ModuleType:
    logging.getLogger(__name__).warning("lookups run as torch operations, which are slower: %s", reason)
    return composition


@functools.cache
def _triton() -> ModuleType:
    from . import triton_backend

    return triton_backend


@functools.cache
def _triton_steps(name: str) -> ModuleType:
    """The module triton_`name`."""
    _triton()  # which refuses a triton that is too old
    return importlib.import_module(f".triton_{name}", __package__)


@functools.cache
def _cuda() -> ModuleType:
    from . import cuda

    return cuda
