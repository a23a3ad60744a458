"""The four steps of a norm in torch operations; between them ranks exchange two sums a token each way.

`mf_train.kernels` has the same functions in C++ (`cpu_norm`) and in Triton (`triton_norm`). Sums that they take from
ranks are [P, ..., 2], every rank's in rank order, or None where x has all features: then they are these features' own.
"""

import sys

import torch
from torch import Tensor

from mf_train.kernels.composition import column_sums
from mf_train.model.sums import chunk_moments, chunk_sums, pairwise_moments, pairwise_sum

STEPS = sys.modules[__name__]  # the module as a name to import: converted models import names only


def moments(x: Tensor, chunk: int, *, centred: bool) -> Tensor:
    """Mean and sum of squared deviations over the last dimension: [..., D] -> [..., 2], in the statistics' dtype."""
    return torch.stack(chunk_moments(x.to(statistics_dtype(x.dtype)), chunk, centred=centred), dim=-1)


def normalise(
    x: Tensor, sums: Tensor | None, weight: Tensor, bias: Tensor | None, chunk: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D] = (x - mean) * rstd * weight + bias, rounded once to x's dtype; mean and rstd [...].

    rstd = 1 / sqrt(variance + epsilon). sums: `moments` of all features, centred if there is a bias.
    """
    if sums is None:
        sums = moments(x, chunk, centred=bias is not None).unsqueeze(0)
    means, deviations = sums.movedim(0, -1).unbind(-2)
    mean, squares = pairwise_moments(means, deviations, x.shape[-1])
    rstd = torch.rsqrt(squares / (x.shape[-1] * len(sums)) + epsilon)
    y = _normal(x, mean, rstd) * weight
    return (y if bias is None else y + bias).to(x.dtype), mean, rstd


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Sums over the last dimension of dy * weight and of dy * weight * (x - mean) * rstd: [..., 2]."""
    scaled = dy.to(rstd.dtype) * weight
    return torch.stack(
        (chunk_sums(scaled, chunk), chunk_sums(scaled * _normal(x, mean, rstd), chunk)), dim=-1
    )


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
    """dx [..., D], d weight [D], d bias [D] (None if not `centred`); sums: `gradient_sums` of all features."""
    if sums is None:
        sums = gradient_sums(dy, x, mean, rstd, weight, chunk).unsqueeze(0)
    means = pairwise_sum(sums.movedim(0, -1)) / (x.shape[-1] * len(sums))
    normal = _normal(x, mean, rstd)
    wide = dy.to(rstd.dtype)
    dx = wide * weight - normal * means[..., 1:]
    if centred:
        dx = dx - means[..., :1]
    d_weight = column_sums(wide * normal).to(weight.dtype)
    d_bias = column_sums(wide).to(weight.dtype) if centred else None
    return (dx * rstd.unsqueeze(-1)).to(x.dtype), d_weight, d_bias


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _normal(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
