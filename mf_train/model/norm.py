"""LayerNorm and RMSNorm over features that may be split over ranks: two sums a token each way."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.config.model import NormKind
from mf_train.kernels import fast_norm
from mf_train.kernels.composition import column_sums
from mf_train.model.norm_steps import STEPS, statistics_dtype
from mf_train.model.sums import num_chunks

Gather = Callable[[Tensor], Tensor]


class Norm(nn.Module):
    """Normalisation of the last dimension with an affine map; statistics in float32 (float64 for float64 input).

    `layernorm` subtracts the mean and has a bias (the paper's "zero-mean" norm); `rmsnorm` does neither.
    Input and output [..., D], of one dtype. `gather` is the only thing that tensor parallelism replaces: it turns this
    rank's two sums a token [..., 2] into every rank's, in rank order [P, ..., 2]. None: all features are here.
    """

    def __init__(self, features: int, kind: NormKind, epsilon: float) -> None:
        super().__init__()
        self.kind = kind
        self.epsilon = epsilon
        self.features = features  # of the whole token, not of this rank's slice
        self.gather: Gather | None = None
        self.weight = nn.Parameter(torch.empty(features))
        self.bias = nn.Parameter(torch.empty(features)) if kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Normalise.apply(x, self.weight, self.bias, self.features, self.epsilon, self.gather)
        return y


class HeadNorm(nn.Module):
    """RMS normalisation of each attention head's features, with a gain of its own for each: [..., H * head] both ways.

    y = x / sqrt(mean of the head's x^2 + epsilon) * weight, for queries and keys (Henry et al. 2020, arXiv 2010.04245;
    ViT-22B, arXiv 2302.05442). Heads share no gain, as in Cohere's Command R+ and StableLM 2, so a rank that holds some
    of the heads has their gains and normalises them by itself. Statistics as torch's rms_norm has them: in float32 for
    narrower types.
    """

    def __init__(self, features: int, head_size: int, epsilon: float) -> None:
        super().__init__()
        self.head_size = head_size
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(features))

    def forward(self, x: Tensor) -> Tensor:
        heads = F.rms_norm(x.unflatten(-1, (-1, self.head_size)), (self.head_size,), eps=self.epsilon)
        y: Tensor = _Gain.apply(heads.flatten(-2), self.weight)
        return y


class _Gain(torch.autograd.Function):
    """x [..., D] times weight [D]; a column of the weight's gradient has the same bits beside any others."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        d_weight = column_sums(gradients[0].to(statistics_dtype(x.dtype)) * x)
        return gradients[0] * weight, d_weight.to(weight.dtype)


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
        gather: Gather | None,
    ) -> Tensor:
        steps = fast_norm(x) or STEPS
        chunk = features // num_chunks(features)
        sums = None if gather is None else gather(steps.moments(x, chunk, centred=bias is not None))
        y: Tensor
        y, mean, rstd = steps.normalise(x, sums, weight, bias, chunk, epsilon)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.chunk, ctx.gather, ctx.centred = chunk, gather, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        given = gradients[0], x, mean, rstd, weight
        steps = fast_norm(x) or STEPS
        sums = None if ctx.gather is None else ctx.gather(steps.gradient_sums(*given, ctx.chunk))
        return *steps.gradients(*given, sums, ctx.chunk, centred=ctx.centred), None, None, None
