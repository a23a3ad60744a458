"""AdamW over compact numbers in C++ (csrc/adamw.cpp); see `mf_train.kernels.adamw`."""

import ctypes

import torch
from torch import Tensor

from .adamw import Draw, Held, Rates, layout
from .buffers import address, check
from .cpu import call

# As csrc/adamw.cpp numbers them.
_KINDS = {"float32": 0, "bfloat16": 1, "int8": 2, "row": 3, "split": 4}


class _Rates(ctypes.Structure):
    _fields_ = [(name, ctypes.c_float) for name in Rates._fields]


class _Draw(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_uint32 if name in ("low", "high") else ctypes.c_int64) for name in Draw._fields
    ]


def update(
    gradient: Tensor, unit: int, master: Held, first: Held, second: Held, rates: Rates, draw: Draw
) -> None:
    """One step, in place; gradient float32 [N] on the CPU, N a multiple of `unit`."""
    numel = gradient.numel()
    if numel % unit:
        raise ValueError(f"{numel} numbers are not whole units of {unit}")
    call(
        *("mf_adamw", address("gradient", gradient, torch.float32, (numel,))),
        *_pointers("master", master, numel, unit),
        *_pointers("first", first, numel, unit),
        *_pointers("second", second, numel, unit, second=True),
        *(numel // unit, unit, ctypes.byref(_Rates(*rates)), ctypes.byref(_Draw(*draw))),
    )


def _pointers(
    name: str, held: Held, numel: int, unit: int, *, second: bool = False
) -> tuple[int | None, ...]:
    """How it is held, where the numbers are, and where what is held beside them is."""
    tensors = layout(held.kind, numel, unit, second=second)
    for tensor, (dtype, size) in zip(held.tensors, tensors, strict=True):
        check(dtype, (size,), **{name: tensor})
    pointers = [tensor.data_ptr() for tensor in held.tensors]
    return _KINDS[held.kind], pointers[0], pointers[1] if len(pointers) == 2 else None
