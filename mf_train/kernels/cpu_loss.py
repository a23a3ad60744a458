"""The three steps of the cross-entropy in C++ (csrc/cross_entropy.cpp), for float32 and bfloat16: as
mf_train/model/loss_steps.py."""

import torch
from torch import Tensor

from .cpu import FLOATS, call


def largest(logits: Tensor) -> Tensor:
    """The largest logit of each token: [..., V] -> [...] float32."""
    logits = logits.contiguous()
    most = torch.empty(logits.shape[:-1], dtype=torch.float32)
    call("mf_loss_largest", logits, FLOATS[logits.dtype], *_sizes(logits), most)
    return most


def exp_sums(logits: Tensor, most: Tensor, chunk: int) -> Tensor:
    """Sum of exp(logit - most) over the last dimension, by chunks and then by pairs: [..., V] -> [...] float32."""
    logits, most = logits.contiguous(), most.contiguous()
    sums = torch.empty_like(most)
    call("mf_loss_exp_sums", logits, FLOATS[logits.dtype], most, *_sizes(logits), chunk, sums)
    return sums


def gradient(logits: Tensor, normaliser: Tensor, factor: Tensor, target: Tensor) -> Tensor:
    """(exp(logit - normaliser) - [at target]) * factor: [..., V] in logits' dtype.

    normaliser and factor [...] float32; target [...] int64, negative where it is not among these logits.
    """
    logits, normaliser, factor, target = (t.contiguous() for t in (logits, normaliser, factor, target))
    d_logits = torch.empty_like(logits)
    call(
        "mf_loss_gradient",
        logits,
        FLOATS[logits.dtype],
        normaliser,
        factor,
        target,
        *_sizes(logits),
        d_logits,
    )
    return d_logits


def _sizes(logits: Tensor) -> tuple[int, int]:
    return logits.shape[:-1].numel(), logits.shape[-1]
