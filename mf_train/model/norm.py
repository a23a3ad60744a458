"""LayerNorm and RMSNorm over features that may be split over ranks: two sums a token each way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.config.model import NormKind
from mf_train.model.sums import chunk_moments, chunk_sums, num_chunks, pairwise_moments, pairwise_sum

Gather = Callable[[Tensor], Tensor]


class Norm(nn.Module):
    """Normalisation of the last dimension with an affine map; statistics in float32 (float64 for float64 input).

    `layernorm` subtracts the mean and has a bias (the paper's "zero-mean" norm); `rmsnorm` does neither.
    Input and output [..., D], of one dtype. `gather` is the only thing that tensor parallelism replaces.
    """

    def __init__(self, features: int, kind: NormKind, epsilon: float) -> None:
        super().__init__()
        self.kind = kind
        self.epsilon = epsilon
        self.features = features  # of the whole token, not of this rank's slice
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features)) if kind == "layernorm" else None

    def gather(self, sums: Tensor) -> Tensor:
        """This rank's sums [..., 2] -> every rank's sums, in rank order [..., 2, P]. Here P = 1."""
        return sums.unsqueeze(-1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, self.features, self.epsilon, self.gather)
        return y


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias; without a bias the mean is taken as zero."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        features: int,
        epsilon: float,
        gather: Gather,
    ) -> Tensor:
        wide = x.to(_statistics_dtype(x.dtype))
        chunk = features // num_chunks(features)
        sums = gather(torch.stack(chunk_moments(wide, chunk, centred=bias is not None), dim=-1))
        mean, squares = pairwise_moments(sums[..., 0, :], sums[..., 1, :], x.shape[-1])
        rstd = torch.rsqrt(squares / features + epsilon)
        y = (wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * weight
        if bias is not None:
            y = y + bias
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.features, ctx.gather, ctx.has_bias = features, gather, bias is not None
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        rstd = rstd.unsqueeze(-1)
        normal = (x.to(rstd.dtype) - mean.unsqueeze(-1)) * rstd
        dy = gradients[0].to(rstd.dtype)
        scaled = dy * weight
        chunk = ctx.features // num_chunks(ctx.features)
        partial = torch.stack((chunk_sums(scaled, chunk), chunk_sums(scaled * normal, chunk)), dim=-1)
        sums = pairwise_sum(ctx.gather(partial)).unsqueeze(-2) / ctx.features
        dx = scaled - normal * sums[..., 1]
        if ctx.has_bias:
            dx = dx - sums[..., 0]
        tokens = tuple(range(x.dim() - 1))
        d_weight = (dy * normal).sum(tokens).to(weight.dtype)
        d_bias = dy.sum(tokens).to(weight.dtype) if ctx.has_bias else None
        return (dx * rstd).to(x.dtype), d_weight, d_bias, None, None, None


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
