"""What a program of the lookup's Triton kernels takes: tokens or rows, columns, and how many are read at once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of all tables (forward) or dy (backward) in a block of columns: a third of an H100's L2 cache, whose halves
# may each hold a copy. benchmarks/gpu/lookup.py tries others.
L2_BYTES = 16 * 2**20
MIN_PROGRAMS = 1024  # fewer leave the device idle: 8 warps on each of about 130 multiprocessors
LINE_BYTES = 128  # of the cache; no block of columns is narrower
WARP_BYTES = 512  # 16 a lane: what one load instruction reads at most
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def forward_blocks(
    num_tokens: int, num_tables: int, rows: int, out_features: int, item_bytes: int
) -> tuple[int, int, int]:
    """The forward kernel's tokens and columns a program, and tables read at once. They change no bit of y."""
    widest = min(WARP_BYTES // item_bytes, 256, triton.next_power_of_2(out_features))
    narrowest = min(LINE_BYTES // item_bytes, widest)
    block = _power_of_2(L2_BYTES // (num_tables * rows * item_bytes), narrowest, widest)
    tokens = WARP_BYTES // (block * item_bytes)

    def too_few() -> bool:
        return triton.cdiv(num_tokens, tokens) * triton.cdiv(out_features, block) < MIN_PROGRAMS

    while tokens > 1 and too_few():
        tokens //= 2
    while block > narrowest and too_few():
        block //= 2
    return tokens, block, _power_of_2(8 * WARP_BYTES // (tokens * block * item_bytes), 8, 32)


def backward_blocks(
    num_tokens: int, rows: int, out_features: int, chunks: int, item_bytes: int
) -> tuple[int, int, int, int]:
    """The backward kernel's columns of a chunk in a launch, chunks in a launch, tokens read at once, rows a program.

    The first is in the bits of d weights, so it depends on a chunk's columns alone.
    """
    readers = num_tokens // rows  # of a row, if codes are spread evenly
    columns = _backward_columns(num_tokens, out_features, item_bytes)
    block = _backward_columns(num_tokens, out_features // chunks, item_bytes)
    beside = min(max(columns // block, 1), chunks) if block >= out_features // chunks else 1
    unroll = _power_of_2(min(4096 // (beside * block * item_bytes), readers), 2, 8)
    return block, beside, unroll, _power_of_2(32 // max(readers, 1), 1, min(16, rows))


def _backward_columns(num_tokens: int, out_features: int, item_bytes: int) -> int:
    """Columns of dy that stay in the L2 cache."""
    widest = min(2 * WARP_BYTES // item_bytes, triton.next_power_of_2(out_features))
    narrowest = min(WARP_BYTES // item_bytes, widest)
    return _power_of_2(L2_BYTES // (num_tokens * item_bytes), narrowest, widest)


def _power_of_2(value: int, least: int, most: int) -> int:
    """The largest power of 2 that is at most `value`, kept between the powers `least` and `most`."""
    return min(max(1 << value.bit_length() >> 1, least), most)


def sum_type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32
