"""LayerNorm and RMSNorm over features that may be split over ranks: two sums a token each way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.config.model import NormKind
from mf_train.kernels import fast_norm
from mf_train.model.norm_steps import STEPS
from mf_train.model.sums import num_chunks, pairwise_moments, pairwise_sum

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
        steps = fast_norm(x) or STEPS
        chunk = features // num_chunks(features)
        sums = gather(steps.moments(x, chunk, centred=bias is not None))
        mean, squares = pairwise_moments(sums[..., 0, :], sums[..., 1, :], x.shape[-1])
        rstd = torch.rsqrt(squares / features + epsilon)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.features, ctx.gather, ctx.has_bias = features, gather, bias is not None
        y: Tensor = steps.normalise(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        steps = fast_norm(x) or STEPS
        chunk = ctx.features // num_chunks(ctx.features)
        partial = steps.gradient_sums(gradients[0], x, mean, rstd, weight, chunk)
        sums = pairwise_sum(ctx.gather(partial)) / ctx.features
        dx, d_weight, d_bias = steps.gradients(
            gradients[0], x, mean, rstd, weight, sums, centred=ctx.has_bias
        )
        return dx, d_weight, d_bias if ctx.has_bias else None, None, None, None
