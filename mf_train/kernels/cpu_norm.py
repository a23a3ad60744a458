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


def normalise(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(x - mean) * rstd * weight + bias, rounded once to x's dtype; mean and rstd [...] float32."""
    x, mean, rstd = x.contiguous(), mean.contiguous(), rstd.contiguous()
    check(torch.float32, x.shape[:-1], mean=mean, rstd=rstd)
    check(weight.dtype, x.shape[-1:], weight=weight, bias=bias)
    y = torch.empty_like(x)
    call("mf_norm_normalise", x, float_type(x), mean, rstd, weight, bias, float_type(weight), *_sizes(x), y)
    return y


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
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, sums: Tensor, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., D], d weight [D], d bias [D]; sums [..., 2]: `gradient_sums` of all features, over their number."""
    dy, x, mean, rstd, sums = (t.contiguous() for t in (dy.to(x.dtype), x, mean, rstd, sums))
    _check_given(dy, x, mean, rstd, weight)
    check(torch.float32, (*x.shape[:-1], 2), sums=sums)
    dx = torch.empty_like(x)
    d_weight, d_bias = x.new_empty(2, x.shape[-1], dtype=torch.float32)
    types = float_type(x), float_type(weight)
    call(
        *("mf_norm_gradients", dy, x, types[0], mean, rstd, weight, types[1]),
        *(sums, centred, *_sizes(x), dx, d_weight, d_bias),
    )
    return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def _check_given(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor) -> None:
    check(x.dtype, x.shape, dy=dy)
    check(torch.float32, x.shape[:-1], mean=mean, rstd=rstd)
    check(weight.dtype, x.shape[-1:], weight=weight)


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]
