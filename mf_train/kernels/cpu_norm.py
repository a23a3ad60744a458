"""The four steps of a norm in C++ (csrc/norm.cpp), for float32 and bfloat16: as mf_train/model/norm_steps.py."""

import torch
from torch import Tensor

from .cpu import FLOATS, call


def moments(x: Tensor, chunk: int, *, centred: bool) -> Tensor:
    """Mean and sum of squared deviations over the last dimension: [..., D] -> [..., 2] float32."""
    x = x.contiguous()
    sums = torch.empty((*x.shape[:-1], 2), dtype=torch.float32)
    call("mf_norm_moments", x, FLOATS[x.dtype], *_sizes(x), chunk, centred, sums)
    return sums


def normalise(
    x: Tensor, sums: Tensor | None, weight: Tensor, bias: Tensor | None, chunk: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D] in x's dtype, and mean and rstd [...] float32; sums [P, ..., 2]."""
    x, sums, ranks = x.contiguous(), *_gathered(sums)
    y = torch.empty_like(x)
    mean, rstd = torch.empty((2, *x.shape[:-1]), dtype=torch.float32)
    call(
        *("mf_norm_normalise", x, FLOATS[x.dtype], sums, ranks, weight, bias, FLOATS[weight.dtype]),
        *(*_sizes(x), chunk, bias is not None, epsilon, y, mean, rstd),
    )
    return y, mean, rstd


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Sums over the last dimension of dy * weight and of dy * weight * (x - mean) * rstd: [..., 2] float32."""
    dy, x, mean, rstd = (t.contiguous() for t in (dy.to(x.dtype), x, mean, rstd))
    sums = torch.empty((*x.shape[:-1], 2), dtype=torch.float32)
    types = FLOATS[x.dtype], FLOATS[weight.dtype]
    call("mf_norm_gradient_sums", dy, x, types[0], mean, rstd, weight, types[1], *_sizes(x), chunk, sums)
    return sums


def gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    chunk: int,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx [..., D], d weight [D], d bias [D] or None; sums [P, ..., 2]."""
    dy, x, mean, rstd = (t.contiguous() for t in (dy.to(x.dtype), x, mean, rstd))
    sums, ranks = _gathered(sums)
    dx = torch.empty_like(x)
    d_weight, d_bias = torch.empty(2, x.shape[-1], dtype=torch.float32)
    types = FLOATS[x.dtype], FLOATS[weight.dtype]
    call(
        *("mf_norm_gradients", dy, x, types[0], mean, rstd, weight, types[1], sums, ranks),
        *(*_sizes(x), chunk, centred, dx, d_weight, d_bias),
    )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype) if centred else None


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


def _gathered(sums: Tensor | None) -> tuple[Tensor | None, int]:
    """The ranks' sums, and the number of ranks."""
    return (None, 1) if sums is None else (sums.contiguous(), len(sums))
