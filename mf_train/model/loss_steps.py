"""The three steps of the cross-entropy in torch operations; ranks exchange a value a token after the first two.

`mf_train.kernels.cpu_loss` has the same functions in C++.
"""

import sys

import torch
from torch import Tensor

from mf_train.model.sums import chunk_sums

STEPS = sys.modules[__name__]  # the module as a name to import: converted models import names only


def largest(logits: Tensor) -> Tensor:
    """The largest logit of each token: [..., V] -> [...], float32 (float64 for float64)."""
    return logits.amax(-1).to(torch.promote_types(logits.dtype, torch.float32))


def exp_sums(logits: Tensor, most: Tensor, chunk: int) -> Tensor:
    """Sum of exp(logit - most) over the last dimension, by chunks and then by pairs: [..., V] -> [...]."""
    return chunk_sums((logits.to(most.dtype) - most.unsqueeze(-1)).exp_(), chunk)


def gradient(logits: Tensor, normaliser: Tensor, factor: Tensor, target: Tensor) -> Tensor:
    """(exp(logit - normaliser) - [at target]) * factor: [..., V] in logits' dtype.

    normaliser and factor [...]; target [...] int64, negative where it is not among these logits.
    """
    d_logits = (logits.to(normaliser.dtype) - normaliser.unsqueeze(-1)).exp_()
    d_logits.mul_(factor.unsqueeze(-1))
    at_target = torch.where(target >= 0, -factor, 0).unsqueeze(-1)
    d_logits.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), at_target)
    return d_logits.to(logits.dtype)
