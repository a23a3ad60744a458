"""The hash as Triton kernels: codes and weights in one pass over x, and its gradient (arXiv 2411.12992, Eq. 2-12).

A chunk's product and sums run over its bits in order, in one thread, so that a chunk has the same bits in
any company and at any alignment. Everything is computed in float32 (float64 for float64 x).
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .composition import code_dtype

BLOCK = 128  # chunks a program


@triton.jit
def _read_bit(x_ptr, chunk, bit, inside, SLOPE: tl.constexpr, TAU: tl.constexpr, SUM: tl.constexpr):
    """Of one bit of every chunk: z >= 0, |z| and 1 + exp(-2|z|/t), which is 1 / sigmoid(2|z|/t)."""
    z = tl.load(x_ptr + chunk * TAU + bit, mask=inside, other=0.0).to(SUM)
    positive = z >= 0
    magnitude = tl.where(positive, z, -z)  # a NaN stays one
    return positive, magnitude, 1 + tl.exp(magnitude * SLOPE)


@triton.jit
def _hash_kernel(
    x_ptr,
    codes_ptr,
    weights_ptr,
    num_chunks,
    SLOPE: tl.constexpr,
    TAU: tl.constexpr,
    SCALED: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < num_chunks
    code = tl.zeros([BLOCK], tl.int32)
    one_over_probability = tl.full([BLOCK], 1.0, SUM)
    total = tl.zeros([BLOCK], SUM)
    for bit in tl.static_range(TAU):
        positive, magnitude, one_over_sigmoid = _read_bit(x_ptr, chunk, bit, inside, SLOPE, TAU, SUM)
        code += positive.to(tl.int32) << bit
        one_over_probability *= one_over_sigmoid
        total += magnitude
    weight = 1.0 / one_over_probability
    if SCALED:
        weight *= total
    tl.store(codes_ptr + chunk, code.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_ptr + chunk, weight.to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _hash_backward_kernel(
    d_weights_ptr,
    x_ptr,
    dx_ptr,
    num_chunks,
    SLOPE: tl.constexpr,
    TAU: tl.constexpr,
    PADDED_TAU: tl.constexpr,
    SCALED: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = chunk < num_chunks
    one_over_probability = tl.full([BLOCK], 1.0, SUM)
    total = tl.zeros([BLOCK], SUM)
    for bit in tl.static_range(TAU):
        _, magnitude, one_over_sigmoid = _read_bit(x_ptr, chunk, bit, inside, SLOPE, TAU, SUM)
        one_over_probability *= one_over_sigmoid
        total += magnitude
    d_probability = tl.load(d_weights_ptr + chunk, mask=inside, other=0.0).to(SUM) / one_over_probability

    # Again, whole chunks side by side: dx is written in full lines. x comes from the cache this time.
    bits = tl.arange(0, PADDED_TAU)
    place = chunk[:, None] * TAU + bits[None, :]
    written = inside[:, None] & (bits < TAU)[None, :]
    z = tl.load(x_ptr + place, mask=written, other=0.0).to(SUM)
    positive = z >= 0
    decay = tl.exp(tl.where(positive, z, -z) * SLOPE)
    # d log probability / d |z| = (2/t) (1 - sigmoid(2|z|/t)), without the difference's cancellation
    slope = decay / (1 + decay) * (-SLOPE)
    if SCALED:
        slope = slope * total[:, None] + 1
    dx = tl.where(positive, slope, -slope) * d_probability[:, None]
    tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=written)


def hash_codes(x: Tensor, num_tables: int, temperature: float, score: str) -> tuple[Tensor, Tensor]:
    """Codes and weights [..., K] of x [..., D]; as `mf_train.kernels.hash_codes`, which checks arguments."""
    shape = (*x.shape[:-1], num_tables)
    codes = x.new_empty(shape, dtype=code_dtype(x.shape[-1] // num_tables))
    weights = x.new_empty(shape)
    if codes.numel():
        with torch.cuda.device_of(x):
            _hash_kernel[(triton.cdiv(codes.numel(), BLOCK),)](
                x.contiguous(), codes, weights, codes.numel(), **_constants(x, num_tables, temperature, score)
            )
    return codes, weights


def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str
) -> Tensor:
    """d x [..., D] from d weights [..., K] and x; the weights are computed again."""
    dx = x.new_empty(x.shape)
    if dx.numel():
        constants = _constants(x, num_tables, temperature, score)
        with torch.cuda.device_of(x):
            _hash_backward_kernel[(triton.cdiv(d_weights.numel(), BLOCK),)](
                d_weights.contiguous(),
                x.contiguous(),
                dx,
                d_weights.numel(),
                PADDED_TAU=triton.next_power_of_2(constants["TAU"]),
                **constants,
            )
    return dx


def _constants(x: Tensor, num_tables: int, temperature: float, score: str) -> dict[str, Any]:
    """What is compiled in, and how; the temperature too, since a float argument of a kernel is float32."""
    return {
        "SLOPE": -2 / temperature,
        "TAU": x.shape[-1] // num_tables,
        "SCALED": score == "scaled_probability",
        "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
        "enable_fp_fusion": True,
    }
