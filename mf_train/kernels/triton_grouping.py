"""Tokens of every table grouped by code, on the device: a stable counting sort, without atomics or a host's wait."""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # tokens that one program counts or places, and at least as many as there are rows
BLOCK = 64  # tokens that are compared with each other at once
SCANNED = 8192  # counts that are added up at once
# More rows than this: torch.sort, since a program holds a count of every row.
MAX_COUNTED_ROWS = 4096


@triton.jit
def _read_codes(codes_ptr, token, num_tokens, ROWS: tl.constexpr):
    """Codes of tokens in int32; -1 for codes out of range and past the last token."""
    code = tl.load(codes_ptr + token, mask=token < num_tokens, other=0)
    in_range = (token < num_tokens) & (code >= 0) & (code.to(tl.int64) < ROWS)
    return tl.where(in_range, code.to(tl.int32), -1)


@triton.jit
def _count_kernel(codes_ptr, counts_ptr, num_tokens, num_chunks, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[k, chunk, row] of codes [K, N]."""
    chunk = tl.program_id(0) % num_chunks
    table = (tl.program_id(0) // num_chunks).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    code = _read_codes(codes_ptr + table * num_tokens, token, num_tokens, ROWS)
    counts = tl.histogram(code, ROWS, mask=code >= 0)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), counts)


@triton.jit
def _scan_kernel(counts_ptr, ends_ptr, num_chunks, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """Of one table: a row's counts [chunk, row] become the number of its tokens in earlier chunks; ends [row]."""
    table = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.int32)
    for first in tl.range(0, num_chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        place = (table * num_chunks + chunk)[:, None] * ROWS + row[None, :]
        inside = (chunk < num_chunks)[:, None]
        count = tl.load(counts_ptr + place, mask=inside, other=0)
        tl.store(counts_ptr + place, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(ends_ptr + table * ROWS + row, tl.cumsum(total, axis=0))


@triton.jit
def _place_kernel(
    codes_ptr,
    earlier_ptr,
    ends_ptr,
    tokens_ptr,
    num_tokens,
    num_chunks,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's place: behind the rows before its own, and behind its row's tokens that come before it."""
    chunk = tl.program_id(0) % num_chunks
    table = (tl.program_id(0) // num_chunks).to(tl.int64)
    codes_ptr += table * num_tokens
    tokens_ptr += table * num_tokens
    row = tl.arange(0, ROWS)
    next_place = tl.load(earlier_ptr + tl.program_id(0).to(tl.int64) * ROWS + row)
    next_place += tl.load(ends_ptr + table * ROWS + row - 1, mask=row > 0, other=0)
    lane = tl.arange(0, BLOCK)
    for start in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, num_tokens), BLOCK):
        code = _read_codes(codes_ptr, start + lane, num_tokens, ROWS)
        before = (code[:, None] == code[None, :]) & (lane[:, None] < lane[None, :])
        place = tl.gather(next_place, tl.maximum(code, 0), axis=0) + tl.sum(before.to(tl.int32), axis=0)
        tl.store(tokens_ptr + place, start + lane, mask=code >= 0)
        next_place += tl.histogram(code, ROWS, mask=code >= 0)


def group_tokens(codes_nk: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The tokens of each table in the order of their codes, equal codes in the order of tokens.

    Args:
        codes_nk: [N, K], N > 0. Codes outside [0, rows) are left out.
        rows: 2**tau.

    Returns:
        tokens_kn [K, N] int32; and ends_kr [K, rows] int32: the readers of table k's row r are
        `tokens_kn[k, ends_kr[k, r - 1] : ends_kr[k, r]]`, from 0 for r = 0.
    """
    num_tokens, num_tables = codes_nk.shape
    codes_kn = codes_nk.t().contiguous()
    if rows > MAX_COUNTED_ROWS:
        codes_kn = codes_kn.to(torch.int32) if codes_kn.dtype != torch.int64 else codes_kn
        codes_kn = torch.where(codes_kn < 0, rows, codes_kn)  # behind every row, as those that are too large
        sorted_codes, tokens_kn = codes_kn.sort(dim=1, stable=True)
        row = torch.arange(rows, dtype=codes_kn.dtype, device=codes_kn.device).repeat(num_tables, 1)
        return tokens_kn.to(torch.int32), torch.searchsorted(sorted_codes, row, right=True, out_int32=True)
    counts, chunk = _count_in_chunks(codes_kn, rows)
    num_chunks = counts.shape[1]
    grid = (num_tables * num_chunks,)
    ends_kr = codes_kn.new_empty((num_tables, rows), dtype=torch.int32)
    tokens_kn = codes_kn.new_empty(codes_kn.shape, dtype=torch.int32)
    _scan_kernel[(num_tables,)](counts, ends_kr, num_chunks, rows, max(SCANNED // rows, 1), num_warps=8)
    _place_kernel[grid](codes_kn, counts, ends_kr, tokens_kn, num_tokens, num_chunks, rows, chunk, BLOCK)
    return tokens_kn, ends_kr


def count_codes(codes_nk: Tensor, counts: Tensor) -> None:
    """Add codes [N, K], N > 0, to counts int64 [K, rows], at most MAX_COUNTED_ROWS of them; wrong codes to none."""
    with torch.cuda.device_of(counts):
        counts += _count_in_chunks(codes_nk.t().contiguous(), counts.shape[1])[0].sum(dim=1)


def _count_in_chunks(codes_kn: Tensor, rows: int) -> tuple[Tensor, int]:
    """Counts int32 [K, chunks, rows], those of a chunk side by side, no more than there are reads; tokens a chunk."""
    num_tables, num_tokens = codes_kn.shape
    chunk = max(CHUNK, rows)
    num_chunks = triton.cdiv(num_tokens, chunk)
    counts = codes_kn.new_empty((num_tables, num_chunks, rows), dtype=torch.int32)
    _count_kernel[(num_tables * num_chunks,)](codes_kn, counts, num_tokens, num_chunks, rows, chunk)
    return counts, chunk
