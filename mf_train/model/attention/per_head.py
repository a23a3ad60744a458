"""Weights of each head whose gradients have the same bits beside any other heads."""

from typing import Any

import torch
from torch import Tensor

from mf_train.kernels.composition import column_sums


def weighted(x: Tensor, weight: Tensor) -> Tensor:
    """Weighted sums of w neighbours: x [B, H, S + w - 1, C], weight [H, w] -> y [B, H, S, C].

    y_s = sum_i weight_i x_(s + w - 1 - i), so weight_0 is that of the last. In float32, rounded once to x's dtype.
    """
    y: Tensor = _Weighted.apply(x, weight)
    return y


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = torch.promote_types(x.dtype, torch.float32)
        length = x.shape[2] - weight.shape[1] + 1
        y = x.new_zeros(*x.shape[:2], length, x.shape[3], dtype=wide)
        for part, w in _neighbours(x, weight, length):
            y.add_(part.to(wide) * w.to(wide))
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        dy = gradients[0].to(wide)
        d_x = x.new_zeros(x.shape, dtype=wide)
        d_weight = []
        for (part, w), (d_part, _) in zip(
            _neighbours(x, weight, dy.shape[2]), _neighbours(d_x, weight, dy.shape[2]), strict=True
        ):
            d_part.add_(dy * w.to(wide))
            d_weight.append(column_sums((dy * part.to(wide)).movedim(1, -1)))
        return d_x.to(x.dtype), torch.stack(d_weight, 1).to(weight.dtype)


def _neighbours(x: Tensor, weight: Tensor, length: int) -> list[tuple[Tensor, Tensor]]:
    """The rows that weight_i meets, and weight_i as [H, 1, 1], for each i."""
    width = weight.shape[1]
    return [(x[:, :, width - 1 - i : width - 1 - i + length], weight[:, i, None, None]) for i in range(width)]
