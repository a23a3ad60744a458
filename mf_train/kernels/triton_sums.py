"""Sums over rows as a Triton kernel, in an order that depends on the number of rows alone."""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def,assignment"

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # that a program adds
COLUMNS = 64


@triton.jit
def add_pairs(parts, PARTS: tl.constexpr):
    """`pairwise_sum` of mf_train/model/sums.py: of a tuple of up to 8 parts."""
    for level in tl.static_range(3):
        if PARTS >> (level + 1) > 0:
            sums = ()
            for pair in tl.static_range(PARTS >> (level + 1)):
                sums += (parts[2 * pair] + parts[2 * pair + 1],)
            parts = sums
    return parts[0]


@triton.jit(do_not_specialize=["num_rows", "num_columns"])
def _fold_kernel(
    x_ptr, sums_ptr, num_rows, num_columns, SUM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """sums [blocks, columns]: each block's ROWS rows of x added. Nothing is compiled in of how columns are aligned,
    so every column is added in one order.
    """
    column_blocks = tl.cdiv(num_columns, COLUMNS)
    column = (tl.program_id(0) % column_blocks) * COLUMNS + tl.arange(0, COLUMNS)
    block = (tl.program_id(0) // column_blocks).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    value = tl.load(x_ptr + (row * num_columns)[:, None] + column[None, :], mask=inside, other=0).to(SUM)
    tl.store(sums_ptr + block * num_columns + column, tl.sum(value, axis=0), mask=column < num_columns)


def column_sums(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last: [..., D] -> [D] float32 (float64 for float64), as composition's.

    Blocks of 64 rows are added, then blocks of 64 of those sums, and so on: one launch for every factor of 64.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    columns = x.shape[-1]
    rows = x.shape[:-1].numel()
    if not rows:
        return x.new_zeros(columns, dtype=dtype)
    x = x.contiguous()
    while x.dtype != dtype or rows > 1:
        blocks = triton.cdiv(rows, ROWS)
        sums = x.new_empty(blocks, columns, dtype=dtype)
        with torch.cuda.device_of(x):
            _fold_kernel[(blocks * triton.cdiv(columns, COLUMNS),)](
                x,
                sums,
                rows,
                columns,
                SUM=tl.float64 if dtype == torch.float64 else tl.float32,
                ROWS=ROWS,
                COLUMNS=COLUMNS,
            )
        x, rows = sums, blocks
    return x.reshape(columns)
