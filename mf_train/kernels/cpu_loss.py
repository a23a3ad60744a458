"""The three steps of the cross-entropy in C++ (csrc/cross_entropy.cpp), for float32 and bfloat16: as
mf_train/model/loss_steps.py."""

import torch
from torch import Tensor

from .buffers import check, check_chunks
from .cpu import call, float_type


def largest(logits: Tensor) -> Tensor:
    """The largest logit of each token: [..., V] -> [...] float32."""
    logits = logits.contiguous()
    most = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    call("mf_loss_largest", logits, float_type(logits), *_sizes(logits), most)
    return most


def exp_sums(logits: Tensor, most: Tensor, chunk: int) -> Tensor:
    """Sum of exp(logit - most) over the last dimension, by chunks and then by pairs: [..., V] -> [...] float32."""
    logits, most = logits.contiguous(), most.contiguous()
    check(torch.float32, logits.shape[:-1], most=most)
    check_chunks(logits.shape[-1], logits.shape[-1] / chunk)
    sums = torch.empty_like(most)
    call("mf_loss_exp_sums", logits, float_type(logits), most, *_sizes(logits), chunk, sums)
    return sums


def gradient(logits: Tensor, normaliser: Tensor, factor: Tensor, target: Tensor) -> Tensor:
    """(exp(logit - normaliser) - [at target]) * factor: [..., V] in logits' dtype.

    normaliser and factor [...] float32; target [...] int64, negative where it is not among these logits.
    """
    logits, normaliser, factor, target = (t.contiguous() for t in (logits, normaliser, factor, target))
    check(torch.float32, logits.shape[:-1], normaliser=normaliser, factor=factor)
    check(torch.int64, logits.shape[:-1], target=target)
    d_logits = torch.empty_like(logits)
    call(
        "mf_loss_gradient",
        logits,
        float_type(logits),
        normaliser,
        factor,
        target,
        *_sizes(logits),
        d_logits,
    )
    return d_logits


def _sizes(logits: Tensor) -> tuple[int, int]:
    return logits.shape[:-1].numel(), logits.shape[-1]
