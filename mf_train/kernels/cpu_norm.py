"""The four steps of a norm in C++ (csrc/norm.cpp), for float32 and bfloat16: as mf_train/model/norm_steps.py."""

import torch
from torch import Tensor

from .buffers import check, check_chunks
from .cpu import call, float_type


def moments(x: Tensor, chunk: int, *, centred: bool) -> Tensor:
    """Mean and sum of squared deviations over the last dimension: [..., D] -> [..., 2] float32."""
    x = x.contiguous()
    check_chunks(x.shape[-1], x.shape[-1] / chunk)
    sums = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    call("mf_norm_moments", x, float_type(x), *_sizes(x), chunk, centred, sums)
    return sums


def normalise(
    x: Tensor, sums: Tensor | None, weight: Tensor, bias: Tensor | None, chunk: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D] in x's dtype, and mean and rstd [...] float32; sums [P, ..., 2]."""
    x, sums, ranks = x.contiguous(), *_gathered(sums, x.shape[:-1])
    check(weight.dtype, x.shape[-1:], weight=weight, bias=bias)
    check_chunks(x.shape[-1], x.shape[-1] / chunk)
    y = torch.empty_like(x)
    mean, rstd = x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)
    call(
        *("mf_norm_normalise", x, float_type(x), sums, ranks, weight, bias, float_type(weight)),
        *(*_sizes(x), chunk, bias is not None, epsilon, y, mean, rstd),
    )
    return y, mean, rstd


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Sums over the last dimension of dy * weight and of dy * weight * (x - mean) * rstd: [..., 2] float32."""
    dy, x, mean, rstd = (t.contiguous() for t in (dy.to(x.dtype), x, mean, rstd))
    _check_given(dy, x, mean, rstd, weight)
    check_chunks(x.shape[-1], x.shape[-1] / chunk)
    sums = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    types = float_type(x), float_type(weight)
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
    sums, ranks = _gathered(sums, x.shape[:-1])
    _check_given(dy, x, mean, rstd, weight)
    check_chunks(x.shape[-1], x.shape[-1] / chunk)
    dx = torch.empty_like(x)
    d_weight, d_bias = x.new_empty(2, x.shape[-1], dtype=torch.float32)
    types = float_type(x), float_type(weight)
    call(
        *("mf_norm_gradients", dy, x, types[0], mean, rstd, weight, types[1], sums, ranks),
        *(*_sizes(x), chunk, centred, dx, d_weight, d_bias),
    )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype) if centred else None


def _check_given(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> None:
    check(x.dtype, x.shape, dy=dy)
    check(torch.float32, x.shape[:-1], mean=mean, rstd=rstd)
    check(weight.dtype, x.shape[-1:], weight=weight)


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


def _gathered(sums: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int]:
    """The ranks' sums, [P, *shape, 2], and the number of ranks."""
    if sums is None:
        return None, 1
    sums = sums.contiguous()
    check(torch.float32, (len(sums), *shape, 2), sums=sums)
    return sums, len(sums)
