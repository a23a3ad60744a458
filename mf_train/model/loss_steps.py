"""The two steps of the cross-entropy in torch operations; between them ranks exchange three values a chunk.

`mf_train.kernels.cpu_loss` has the same functions in C++, `mf_train.kernels.triton_loss` in Triton.
"""

import sys

import torch
from torch import Tensor

STEPS = sys.modules[__name__]  # the module as a name to import: converted models import names only


def sums(logits: Tensor, target: Tensor, chunk: int) -> Tensor:
    """Of each chunk of the vocabulary its largest logit, the sum of exp(logit - largest), and the target's logit.

    logits [..., C * chunk]; target [...] int64, negative where it is not among these logits -> [..., 3, C], float32
    (float64 for float64). The largest is at least the lowest finite number, so that a chunk of minus infinities has
    the sum 0. The target's logit is 0 in chunks that do not hold it. A NaN or plus infinity makes its chunk's sum NaN.
    """
    chunks = logits.to(torch.promote_types(logits.dtype, torch.float32)).unflatten(-1, (-1, chunk))
    most = chunks.amax(-1).clamp(min=torch.finfo(chunks.dtype).min)
    totals = (chunks - most.unsqueeze(-1)).exp_().sum(-1)
    place = target.clamp(min=0).unsqueeze(-1)
    picked = logits.gather(-1, place).to(most.dtype).where((target >= 0).unsqueeze(-1), 0)
    return torch.stack((most, totals, torch.zeros_like(most).scatter(-1, place // chunk, picked)), dim=-2)


def gradient(
    logits: Tensor,
    normaliser: Tensor,
    factor: Tensor,
    target: Tensor,
    *,
    overwrite: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """(exp(logit - normaliser) - [at target]) * factor: [..., V] in logits' dtype.

    normaliser and factor [...], of the type of `sums`; target as there. With `overwrite` the logits become the result.
    With a `softcap` it is the gradient of what was capped to these logits: times 1 - (logit / softcap)^2.
    """
    d_logits = (logits.to(normaliser.dtype) - normaliser.unsqueeze(-1)).exp_()
    d_logits.mul_(factor.unsqueeze(-1))
    at_target = torch.where(target >= 0, -factor, 0).unsqueeze(-1)
    d_logits.scatter_add_(-1, target.clamp(min=0).unsqueeze(-1), at_target)
    if softcap:
        d_logits.mul_(1 - (logits.to(d_logits.dtype) / softcap).square_())
    return logits.copy_(d_logits) if overwrite else d_logits.to(logits.dtype)
