"""The two steps of the cross-entropy as Triton kernels: as mf_train/model/loss_steps.py.

Each logit is read once for its chunk's largest logit and sum, and read and written once for the gradient. A program of
the first kernel has a chunk to itself and sees neither the token nor the other chunks, so that a chunk has the same
bits on any number of ranks.
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # logits at once: two loads of 16 bytes a lane in bfloat16
NUM_WARPS = 4
LOWEST = torch.finfo(torch.float32).min


@triton.jit(do_not_specialize=["num_chunks"])
def _sums_kernel(
    logits_ptr, target_ptr, sums_ptr, num_chunks, chunk, LOWEST: tl.constexpr, BLOCK: tl.constexpr
):
    """Every lane keeps the largest of its logits, and its sum relative to that; lanes are joined at the end."""
    program = tl.program_id(0).to(tl.int64)  # chunks of all tokens, one behind the other
    token = program // num_chunks
    number = program % num_chunks
    logits_ptr += program * chunk
    lane = tl.arange(0, BLOCK)
    most = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in tl.range(0, chunk, BLOCK):
        column = first + lane
        logit = tl.load(logits_ptr + column, mask=column < chunk, other=float("-inf")).to(tl.float32)
        larger = logit > most
        decay = tl.exp(tl.where(larger, most - logit, logit - most))  # a NaN stays one
        total = tl.where(larger, total * decay + 1, total + decay)
        most = tl.where(larger, logit, most)
    largest = tl.max(most, axis=0)
    total = tl.sum(total * tl.exp(most - largest), axis=0)  # inf - inf: NaN, as of torch operations
    place = tl.load(target_ptr + token) - number * chunk
    picked = tl.load(logits_ptr + place, mask=(place >= 0) & (place < chunk), other=0).to(tl.float32)
    sums_ptr += token * 3 * num_chunks + number
    tl.store(sums_ptr, largest)
    tl.store(sums_ptr + num_chunks, total)
    tl.store(sums_ptr + 2 * num_chunks, picked)


@triton.jit
def _gradient_kernel(
    logits_ptr,
    normaliser_ptr,
    factor_ptr,
    target_ptr,
    out_ptr,
    vocabulary,
    inverse_cap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out may be logits: every logit is read and written by one lane."""
    blocks = tl.cdiv(vocabulary, BLOCK)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    normaliser = tl.load(normaliser_ptr + token)
    factor = tl.load(factor_ptr + token)
    target = tl.load(target_ptr + token)
    place = token * vocabulary + column
    logit = tl.load(logits_ptr + place, mask=inside, other=0).to(tl.float32)
    gradient = tl.exp(logit - normaliser) * factor
    gradient = tl.where(column == target, gradient - factor, gradient)
    if CAPPED:
        share = logit * inverse_cap
        gradient *= 1 - share * share
    tl.store(out_ptr + place, gradient.to(out_ptr.dtype.element_ty), mask=inside)


def sums(logits: Tensor, target: Tensor, chunk: int) -> Tensor:
    """Of each chunk its largest logit, its sum of exponentials, the target's logit: [..., C * chunk] -> [..., 3, C].

    logits float32, bfloat16 or float16; target [...] int64, negative where it is not among them -> float32.
    """
    num_chunks = logits.shape[-1] // chunk
    out = logits.new_empty((*logits.shape[:-1], 3, num_chunks), dtype=torch.float32)
    if out.numel():
        with torch.cuda.device_of(logits):
            _sums_kernel[(target.numel() * num_chunks,)](
                logits.contiguous(),
                target.contiguous(),
                out,
                num_chunks,
                chunk,
                LOWEST=LOWEST,
                BLOCK=block(chunk),
                num_warps=NUM_WARPS,
            )
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

    normaliser and factor [...] float32; target as for `sums`. `overwrite` needs contiguous logits. With a `softcap`
    times 1 - (logit / softcap)^2.
    """
    assert logits.is_contiguous() or not overwrite
    out = logits if overwrite else torch.empty_like(logits, memory_format=torch.contiguous_format)
    vocabulary = logits.shape[-1]
    if out.numel():
        with torch.cuda.device_of(logits):
            _gradient_kernel[(target.numel() * triton.cdiv(vocabulary, block(vocabulary)),)](
                logits.contiguous(),
                normaliser.contiguous(),
                factor.contiguous(),
                target.contiguous(),
                out,
                vocabulary,
                1 / softcap if softcap else 0.0,
                CAPPED=softcap > 0,
                BLOCK=block(vocabulary),
                num_warps=NUM_WARPS,
            )
    return out


def block(columns: int) -> int:
    """Logits that a program takes at once."""
    return min(BLOCK, triton.next_power_of_2(columns))
