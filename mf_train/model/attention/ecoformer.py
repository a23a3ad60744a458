"""Attention between binary codes: EcoFormer (Liu et al. 2022, arXiv 2209.09004), made causal."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.config.model import HASH_SAMPLE, ModelConfig
from mf_train.model.attention.base import Attention, State
from mf_train.model.attention.linear import causal_mean, wide

SHARE = 8  # for each query, one key of the sample in so many is similar, and as many are dissimilar
LOSS_WEIGHT = 1e-4  # a row's: AdamW's updates do not depend on it, and what is clipped hardly does


class EcoformerAttention(Attention):
    """y_t = sum_(j <= t) s_tj v_j / sum_(j <= t) s_tj, s_tj = h(q_t) . h(k_j) + b + 1, h(x) = sign(A kappa(x) - c).

    kappa_i(x) = exp(-|x - u_i|^2 / 4), with x and the m anchors u_i at length 1: 4 is twice what |x - u_i|^2 is at a
    right angle. s, from codes of b = `model.attention_bits` bits, is never below 1; m is `model.attention_anchors`.
    The gradient passes a sign whose argument is within (-1, 1), and goes to q and k alone.

    A, c and the anchors get no gradient of the model's loss but that of the paper's own, by which codes of similar
    pairs agree and those of dissimilar ones do not: |h(q) h(k)^T / b - Y|^2, with 2 sigmoid - 1 for sign. Y is 1 for
    the keys that are nearest to a query in a sample of the row, -1 for the farthest, and else 0. The paper finds A anew
    every so many epochs, by descents of its own, with anchors out of a batch. Here every step of training is a step of
    theirs too, by the run's optimiser: checkpoints and ranks hold them as any weight. Rows with padding teach nothing.

    The state, of constant size, is that of linear attention.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        heads, self.bits, anchors = config.num_heads, config.attention_bits, config.attention_anchors
        self.anchors = nn.Parameter(torch.empty(heads, anchors, config.head_size))
        self.hash_weight = nn.Parameter(torch.empty(heads, self.bits, anchors))
        self.hash_threshold = nn.Parameter(torch.empty(heads, self.bits))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        dtype = v.dtype
        if torch.is_grad_enabled() and self.hash_weight.requires_grad and padding is None and q.shape[2] > 1:
            v = _Taught.apply(v, self._loss(q.detach(), k.detach()))
        weights = [weight.detach() for weight in (self.anchors, self.hash_weight, self.hash_threshold)]
        codes = (_Sign.apply(_before_sign(x, *weights)) for x in (q, k))
        # a feature more, so that a product of two is b + 1 more
        q, k = (F.pad(x, (0, 1), value=math.sqrt(self.bits + 1)) for x in codes)
        if padding is not None:
            k = k * padding.bool()[:, None, :, None]
        (v,) = wide(v)
        y, state = causal_mean(q, k, v, state)
        return y.to(dtype), state

    def _loss(self, q: Tensor, k: Tensor) -> Tensor:
        """Of the hash, over every so-many-th position of each row: q, k [B, H, S, head] -> []."""
        step = -(-q.shape[2] // HASH_SAMPLE)
        q, k = q[:, :, ::step], k[:, :, ::step]
        with torch.no_grad():
            alike = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).transpose(-1, -2)
            count = -(-alike.shape[-1] // SHARE)
            wanted = torch.zeros_like(alike)
            wanted.scatter_(-1, alike.topk(count).indices, 1.0)
            wanted.scatter_(-1, alike.topk(count, largest=False).indices, -1.0)
        weights = self.anchors, self.hash_weight, self.hash_threshold
        of_q, of_k = (_before_sign(x, *weights).mul(0.5).tanh() for x in (q, k))
        products = of_q @ of_k.transpose(-1, -2) / self.bits
        return LOSS_WEIGHT * (products - wanted).square().mean((-1, -2)).sum()


def _before_sign(x: Tensor, anchors: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """A kappa(x) - c, float32: x [B, H, S, head], anchors [H, m, head], weight [H, b, m], threshold [H, b] -> [.., b].

    kappa less its value at a right angle, so that codes begin with both signs.
    """
    x, anchors, weight, threshold = wide(x, anchors, weight, threshold)
    x, anchors = F.normalize(x, dim=-1), F.normalize(anchors, dim=-1)
    cosine = torch.einsum("bhsd,hmd->bhsm", x, anchors)
    kappa = ((cosine - 1) / 2).exp() - math.exp(-0.5)
    # in one product, so that a head's gradients have the same bits beside any others
    return torch.einsum(
        "bhsm,hnm->bhsn", F.pad(kappa, (0, 1), value=-1.0), torch.cat((weight, threshold.unsqueeze(-1)), -1)
    )


class _Sign(torch.autograd.Function):
    """1 or -1, 1 at 0; the gradient passes where |x| < 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() < 1)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (passes,) = ctx.saved_tensors
        return gradients[0] * passes


class _Taught(torch.autograd.Function):
    """x as it is; a backward pass through it is also one from `loss`, whose gradient is 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], torch.ones((), device=gradients[0].device)
