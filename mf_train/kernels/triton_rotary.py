"""Rotary embedding of queries and keys as a Triton kernel, forward and backward: `model.attention.rotary.rotate`.

In float32, each result rounded once. The backward pass turns the other way.
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # numbers of q, and as many of k, a program


@triton.jit
def _turn(
    x_ptr,
    y_ptr,
    cosine,
    sine,
    row,
    inside,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
):
    """Rows of x to y: pairs (i, i + HALF) are turned, the rest is copied."""
    start = (row * SIZE)[:, None]
    pair = tl.arange(0, PADDED_HALF)[None, :]
    turned = inside[:, None] & (pair < HALF)
    first = tl.load(x_ptr + start + pair, mask=turned, other=0).to(tl.float32)
    second = tl.load(x_ptr + start + HALF + pair, mask=turned, other=0).to(tl.float32)
    element = y_ptr.dtype.element_ty
    tl.store(y_ptr + start + pair, (first * cosine - second * sine).to(element), mask=turned)
    tl.store(y_ptr + start + HALF + pair, (second * cosine + first * sine).to(element), mask=turned)
    if 2 * HALF < SIZE:
        rest = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
        copied = inside[:, None] & (rest < SIZE)
        tl.store(y_ptr + start + rest, tl.load(x_ptr + start + rest, mask=copied, other=0), mask=copied)


@triton.jit(do_not_specialize=["num_rows", "num_positions"])
def _rotate_kernel(
    q_ptr,
    k_ptr,
    turned_q_ptr,
    turned_k_ptr,
    cosine_ptr,
    sine_ptr,
    num_rows,
    num_positions,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
    BACK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """A row is one head of one token; positions are those of a sequence, or of all tokens one by one."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    pair = tl.arange(0, PADDED_HALF)[None, :]
    angle = (row // HEADS % num_positions * HALF)[:, None] + pair
    known = inside[:, None] & (pair < HALF)
    cosine = tl.load(cosine_ptr + angle, mask=known, other=0)
    sine = tl.load(sine_ptr + angle, mask=known, other=0)
    if BACK:
        sine = -sine
    _turn(q_ptr, turned_q_ptr, cosine, sine, row, inside, SIZE, HALF, PADDED_HALF, PADDED_REST)
    _turn(k_ptr, turned_k_ptr, cosine, sine, row, inside, SIZE, HALF, PADDED_HALF, PADDED_REST)


def rotate(q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Both rotated: q and k [B, H, S, head] of one type -> the same shapes, laid out as [B, S, H, head].

    float32, bfloat16 or float16. rotary: cosine and sine, float32 [1 or B, 1, S, size / 2] or without the first
    dimension, as `mf_train.model.attention.rotary.rotary_table` makes them; no gradient goes to them.
    """
    if not rotary[0].shape[-1]:
        return q, k
    return _Rotate.apply(q, k, *rotary)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cosine, sine)
        return turn(q, k, cosine, sine, back=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *turn(*gradients, *ctx.saved_tensors, back=True), None, None


def turn(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, *, back: bool) -> tuple[Tensor, Tensor]:
    """As `rotate`, by these angles or by their negatives; without gradient."""
    # attention's are views of [B, S, H, head]: no copy
    q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
    turned_q, turned_k = torch.empty_like(q), torch.empty_like(k)
    heads, size = q.shape[-2:]
    half = cosine.shape[-1]
    if q.numel():
        fixed, num_rows = constants(heads, size, half), q.numel() // size
        with torch.cuda.device_of(q):
            _rotate_kernel[(triton.cdiv(num_rows, fixed["ROWS"]),)](
                q,
                k,
                turned_q,
                turned_k,
                cosine.contiguous(),
                sine.contiguous(),
                num_rows,
                cosine.numel() // half,
                BACK=back,
                **fixed,
            )
    return turned_q.transpose(1, 2), turned_k.transpose(1, 2)


def constants(heads: int, size: int, half: int) -> dict[str, int]:
    """What is compiled in for a number of heads, the size of one, and its turned pairs."""
    return {
        "HEADS": heads,
        "SIZE": size,
        "HALF": half,
        "PADDED_HALF": triton.next_power_of_2(half),
        "PADDED_REST": triton.next_power_of_2(max(size - 2 * half, 1)),
        "ROWS": max(BLOCK // triton.next_power_of_2(size), 1),
    }
