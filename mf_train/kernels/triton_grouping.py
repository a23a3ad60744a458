"""Tokens of every table grouped by code, on the device: a stable counting sort, without atomics or a host's wait."""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256  # tokens that one program counts or places
BLOCK = 64  # tokens that are compared with as many others at once
# More rows than this: torch.sort, since counts of every row in every chunk would outgrow the tokens.
MAX_COUNTED_ROWS = 4096


@triton.jit
def _read_codes(codes_ptr, token, num_tokens, ROWS: tl.constexpr):
    """Codes of tokens in int32; -1 for codes out of range and past the last token."""
    code = tl.load(codes_ptr + token, mask=token < num_tokens, other=0)
    in_range = (token < num_tokens) & (code >= 0) & (code.to(tl.int64) < ROWS)
    return tl.where(in_range, code.to(tl.int32), -1)


@triton.jit
def _count_kernel(codes_ptr, counts_ptr, num_tokens, num_chunks, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """counts[k, row, chunk] of codes [K, N]."""
    chunk = tl.program_id(0) % num_chunks
    table = (tl.program_id(0) // num_chunks).to(tl.int64)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    code = _read_codes(codes_ptr + table * num_tokens, token, num_tokens, ROWS)
    counts = tl.histogram(code, ROWS, mask=code >= 0)
    tl.store(counts_ptr + (table * ROWS + tl.arange(0, ROWS)) * num_chunks + chunk, counts)


@triton.jit
def _place_kernel(
    codes_ptr,
    ends_ptr,
    tokens_ptr,
    num_tokens,
    num_chunks,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A token's place: the tokens before its (row, chunk), and those of its chunk before it with its code."""
    chunk = tl.program_id(0) % num_chunks
    table = (tl.program_id(0) // num_chunks).to(tl.int64)
    codes_ptr += table * num_tokens
    ends_ptr += table * ROWS * num_chunks
    for start in tl.range(0, CHUNK, BLOCK):
        token = chunk * CHUNK + start + tl.arange(0, BLOCK)
        code = _read_codes(codes_ptr, token, num_tokens, ROWS)
        same = tl.zeros([BLOCK, BLOCK], tl.int32)
        for other_start in tl.range(0, start + BLOCK, BLOCK):
            other = chunk * CHUNK + other_start + tl.arange(0, BLOCK)
            other_code = _read_codes(codes_ptr, other, num_tokens, ROWS)
            before = (other_code[:, None] == code[None, :]) & (other[:, None] < token[None, :])
            same += before.to(tl.int32)
        cell = code.to(tl.int64) * num_chunks + chunk
        first = tl.load(ends_ptr + cell - 1, mask=(code >= 0) & (cell > 0), other=0)
        place = table * num_tokens + first + tl.sum(same, axis=0)
        tl.store(tokens_ptr + place, token, mask=code >= 0)


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
    num_chunks = triton.cdiv(num_tokens, CHUNK)
    grid = (num_tables * num_chunks,)
    counts = torch.empty(num_tables, rows * num_chunks, dtype=torch.int32, device=codes_nk.device)
    tokens_kn = torch.empty(num_tables, num_tokens, dtype=torch.int32, device=codes_nk.device)
    _count_kernel[grid](codes_kn, counts, num_tokens, num_chunks, rows, CHUNK)
    ends = counts.cumsum(dim=1, dtype=torch.int32)  # of (row, chunk), rows first
    _place_kernel[grid](codes_kn, ends, tokens_kn, num_tokens, num_chunks, rows, CHUNK, BLOCK)
    return tokens_kn, ends.view(num_tables, rows, num_chunks)[:, :, -1].contiguous()
