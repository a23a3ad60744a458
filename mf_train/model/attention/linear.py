"""Causal linear attention in chunks, for all kinds whose weight of a key is a product of feature maps.

With features q_i and k_j [F] the sums over keys are a running matrix (Katharopoulos et al. 2020, arXiv 2006.16236,
Eq. 9 to 12):

    y_i = sum_{j <= i} (q_i . k_j) v_j = q_i^T S_i,    S_i = S_{i-1} + k_i v_i^T

In chunks of C positions the keys of the own chunk count by their C x C products, and all earlier ones by the matrix at
the chunk's begin. Time is S (C + 2 F) D; of matrices F x D only those at the chunks' begins are kept for the backward
pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.config.model import CHUNK
from mf_train.model.attention.base import State

_SMALLEST = 1e-6  # that a sum of weights is taken for, where all are 0


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32, or float64 where they are that: the dtype of all sums."""
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def causal_mean(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, log_scale: Tensor | None = None
) -> tuple[Tensor, State]:
    """The mean of values that the weights q_i . k_j give, y_i = sum_j (q_i . k_j) v_j / sum_j (q_i . k_j), j <= i.

    Arguments and state are those of `causal_sums`; no weight may be below 0. Where all are 0, y is 0.
    """
    y, state = causal_sums(q, k, F.pad(v, (0, 1), value=1.0), state, log_scale)
    return y[..., :-1] / y[..., -1:].clamp(min=_SMALLEST), state


def causal_sums(
    q: Tensor, k: Tensor, v: Tensor, state: State | None, log_scale: Tensor | None = None
) -> tuple[Tensor, State]:
    """y_i = sum_{j <= i} (q_i . k_j) v_j: q, k [B, H, S, F] and v [B, H, S, D] -> y [B, H, S, D].

    With `log_scale` c [B, H, S], which gets no gradient, key j stands for e^(c_j) k_j and y_i is divided by e^(m_i),
    m_i the largest c_j so far: no number leaves the floating point's range, and no later position matters.
    All float32 or float64. The state is S [B, H, F, D], divided by e^m where there is a scale, and m [B, H].
    """
    if state is None:
        lowest = torch.finfo(q.dtype).min
        state = q.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1]), q.new_full(q.shape[:2], lowest)
    sums, largest = state
    count = -(-q.shape[2] // CHUNK)
    scales = [None] * count if log_scale is None else log_scale.split(CHUNK, dim=2)
    results = []
    for q_c, k_c, v_c, c in zip(*(x.split(CHUNK, dim=2) for x in (q, k, v)), scales, strict=True):
        weights, earlier = q_c @ k_c.transpose(-1, -2), q_c @ sums
        if c is not None:
            before, m = largest, torch.maximum(c.cummax(-1).values, largest.unsqueeze(-1))
            largest = m[..., -1]
            # a later key's scale may be above m, and its weight does not count
            weights = weights * (c.unsqueeze(-2) - m.unsqueeze(-1)).clamp(max=0).exp()
            earlier = earlier * (before.unsqueeze(-1) - m).exp().unsqueeze(-1)
            sums = sums * (before - largest).exp()[..., None, None]
            k_c = k_c * (c - largest.unsqueeze(-1)).exp().unsqueeze(-1)
        results.append(weights.tril() @ v_c + earlier)
        sums = sums + k_c.transpose(-1, -2) @ v_c
    return torch.cat(results, dim=2), (sums, largest)
