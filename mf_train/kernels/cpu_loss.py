"""The two steps of the cross-entropy in C++ (csrc/cross_entropy.cpp), for float32 and bfloat16: as
mf_train/model/loss_steps.py."""

import torch
from torch import Tensor

from .buffers import check, check_chunks
from .cpu import call, float_type


def sums(logits: Tensor, target: Tensor, chunk: int) -> Tensor:
    """Of each chunk its largest logit, its sum of exponentials, the target's logit: [..., C * chunk] -> [..., 3, C].

    target [...] int64, negative where it is not among these logits; the result float32.
    """
    logits, target = logits.contiguous(), target.contiguous()
    check(torch.int64, logits.shape[:-1], target=target)
    check_chunks(logits.shape[-1], logits.shape[-1] / chunk)
    out = logits.new_empty((*logits.shape[:-1], 3, logits.shape[-1] // chunk), dtype=torch.float32)
    call("mf_loss_sums", logits, float_type(logits), target, *_sizes(logits), chunk, out)
    return out


def gradient(
    logits: Tensor,
    normaliser: Tensor,
    factor: Tensor,
    target: Tensor,
    *,
    overwrite: bool = False,
    softcap: float = 0.0,
) -> Tensor:
    """(exp(logit - normaliser) - [at target]) * factor: [..., V] in logits' dtype, in logits' memory on request.

    `overwrite` needs contiguous logits. With a `softcap` times 1 - (logit / softcap)^2.
    """
    assert logits.is_contiguous() or not overwrite
    logits, normaliser, factor, target = (t.contiguous() for t in (logits, normaliser, factor, target))
    d_logits = logits if overwrite else torch.empty_like(logits)
    check(torch.float32, logits.shape[:-1], normaliser=normaliser, factor=factor)
    check(torch.int64, logits.shape[:-1], target=target)
    call(
        "mf_loss_gradient",
        logits,
        float_type(logits),
        normaliser,
        factor,
        target,
        *_sizes(logits),
        1 / softcap if softcap else 0.0,
        d_logits,
    )
    return d_logits


def _sizes(logits: Tensor) -> tuple[int, int]:
    return logits.shape[:-1].numel(), logits.shape[-1]
