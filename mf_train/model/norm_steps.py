"""The four steps of a norm in torch operations; between them ranks exchange two sums a token each way.

`mf_train.kernels.cpu_norm` has the same functions in C++.
"""

import sys

import torch
from torch import Tensor

from mf_train.kernels.composition import column_sums
from mf_train.model.sums import chunk_moments, chunk_sums

STEPS = sys.modules[__name__]  # the module as a name to import: converted models import names only


def moments(x: Tensor, chunk: int, *, centred: bool) -> Tensor:
    """Mean and sum of squared deviations over the last dimension: [..., D] -> [..., 2], in the statistics' dtype."""
    return torch.stack(chunk_moments(x.to(statistics_dtype(x.dtype)), chunk, centred=centred), dim=-1)


def normalise(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(x - mean) * rstd * weight + bias, rounded once to x's dtype; mean and rstd [...]."""
    y = (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * weight
    return (y if bias is None else y + bias).to(x.dtype)


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Sums over the last dimension of dy * weight and of dy * weight * (x - mean) * rstd: [..., 2]."""
    scaled = dy.to(rstd.dtype) * weight
    return torch.stack(
        (chunk_sums(scaled, chunk), chunk_sums(scaled * _normal(x, mean, rstd), chunk)), dim=-1
    )


def gradients(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, sums: Tensor, *, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [..., D], d weight [D], d bias [D]; sums [..., 2]: `gradient_sums` of all features, over their number."""
    normal = _normal(x, mean, rstd)
    wide = dy.to(rstd.dtype)
    dx = wide * weight - normal * sums[..., 1:]
    if centred:
        dx = dx - sums[..., :1]
    d_weight, d_bias = (column_sums(each).to(weight.dtype) for each in (wide * normal, wide))
    return (dx * rstd.unsqueeze(-1)).to(x.dtype), d_weight, d_bias


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _normal(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.to(mean.dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
