"""The lookup as Triton kernels, forward and int8 forward; `triton_lookup_backward` has its gradients.

A program, one warp, owns a few tokens in a block of columns and sums over k in order. Programs are
numbered tokens first, so that those that run at once share a column block: of all tables, it fits the L2 cache.
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def,assignment"

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import OPTIONS, forward_blocks, sum_type


@triton.jit
def _add_rows(
    total,
    codes_ptr,
    weights_ptr,
    tables_ptr,
    scales_ptr,
    first,
    column,
    inside,
    out_features,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Add the tokens' rows of tables first to first + STEPS - 1, in order. All reads come first: they overlap."""
    weights = ()
    rows = ()
    for step in tl.static_range(STEPS):
        table = first + step
        code = tl.load(codes_ptr + table)
        in_range = (code >= 0) & (code.to(tl.int64) < ROWS)
        row = table.to(tl.int64) * ROWS + tl.where(in_range, code.to(tl.int64), 0)
        weight = tl.load(weights_ptr + table)
        if scales_ptr is None:
            weight = weight.to(tables_ptr.dtype.element_ty).to(total.dtype)
        else:
            weight = weight.to(total.dtype) * tl.load(scales_ptr + row)
        weights += (tl.where(in_range, weight, float("nan")),)  # a wrong code reads row 0 and makes y NaN
        value = (row * out_features)[:, None] + column[None, :]
        rows += (tl.load(tables_ptr + value, mask=inside, other=0),)
    for step in tl.static_range(STEPS):
        total += weights[step][:, None] * rows[step].to(total.dtype)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    codes_ptr,
    weights_ptr,
    tables_ptr,
    scales_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    out_features,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """y [N, O]; scales_ptr is None, or of int8 tables the scale of each row [K, ROWS]; bias_ptr None, or [O]."""
    programs = tl.cdiv(num_tokens, TOKENS)
    token = (tl.program_id(0) % programs).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    token = tl.minimum(token, num_tokens - 1)  # past the end: the last one, once more
    column = (tl.program_id(0) // programs) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < out_features)[None, :]
    codes_ptr += token * K
    weights_ptr += token * K
    total = tl.zeros([TOKENS, BLOCK], SUM)
    for rest in tl.static_range(2):  # UNROLL tables at a time, and at last those that are left over
        for first in tl.range(K - K % UNROLL if rest else 0, K if rest else K - K % UNROLL, UNROLL):
            total = _add_rows(
                total,
                codes_ptr,
                weights_ptr,
                tables_ptr,
                scales_ptr,
                first,
                column,
                inside,
                out_features,
                ROWS,
                K % UNROLL if rest else UNROLL,
            )
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask=column < out_features, other=0).to(SUM)[None, :]
    place = (token * out_features)[:, None] + column[None, :]
    tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=inside)


def lookup(
    codes: Tensor, weights: Tensor, tables: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> list[Tensor]:
    """y [..., O_i] of each of the table sets [K, 2**tau, O_i] that share codes and weights [..., K].

    `biases` [O_i], of each set or of none, are added before the sum is rounded.
    As `mf_train.kernels.lookup`, which checks the arguments. A code outside [0, 2**tau) makes its token's y NaN.
    """
    of_each = biases or itertools.repeat(None, len(tables))
    pairs = zip(tables, of_each, strict=True)
    return [_forward(codes, weights, one, None, bias) for one, bias in pairs]


def lookup_int8(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """y [..., O] in weights' dtype of int8 tables [K, 2**tau, O] whose rows have a scale each [K, 2**tau].

    y = sum_k (weight_k scale_k) row_k with the products and the sum in float32. No gradient.
    """
    return _forward(codes, weights, tables, scales.contiguous(), None)


def _forward(
    codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    num_tables, rows, out_features = tables.shape
    y = tables.new_empty(
        (*codes.shape[:-1], out_features), dtype=tables.dtype if scales is None else weights.dtype
    )
    num_tokens = codes.numel() // num_tables
    if num_tokens:
        tokens, block, unroll = forward_blocks(
            num_tokens, num_tables, rows, out_features, tables.element_size()
        )
        with torch.cuda.device_of(tables):
            _forward_kernel[(triton.cdiv(num_tokens, tokens) * triton.cdiv(out_features, block),)](
                codes.contiguous(),
                weights.contiguous(),
                tables.contiguous(),
                scales,
                None if bias is None else bias.contiguous(),
                y,
                num_tokens,
                out_features,
                K=num_tables,
                ROWS=rows,
                SUM=sum_type(y),
                TOKENS=tokens,
                BLOCK=block,
                UNROLL=unroll,
                **OPTIONS,
            )
    return y
