"""The four steps of a norm as Triton kernels, for float32, bfloat16 and float16: as mf_train/model/norm_steps.py.

A program has a few whole tokens, in a tile [tokens, columns] for each chunk of this rank's features. It keeps the
tiles, so a kernel reads x and dy once. Where all features are here, one kernel is the forward pass, and another the
backward pass but for the sums over tokens.

A chunk is summed within a row of its tile, in float32, then chunks by pairs. The tile's size and the alignment that the
compiler may assume depend on the chunk alone, and products are not fused into sums: so a chunk's sum has the same bits
on any number of ranks, in either kernel that takes it.
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_sums import add_pairs, column_sums

ELEMENTS = 2048  # of a tile
WARPS = 8


@triton.jit
def _read_chunks(
    x_ptr,
    token,
    num_tokens,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The tokens' tiles of x [num_tokens, CHUNKS * CHUNK], and zeros around them."""
    tiles = ()
    for c in tl.static_range(CHUNKS):
        place, inside = _tile(token, num_tokens, c, CHUNKS, CHUNK, BLOCK, ALIGN)
        tiles += (tl.load(x_ptr + place, mask=inside, other=0),)
    return tiles


@triton.jit
def _tile(
    token,
    num_tokens,
    number: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Where a chunk's tile lies, and what of it is inside."""
    column = tl.arange(0, BLOCK)
    # the same claim for every chunk and number of chunks, though some are aligned better
    first = tl.multiple_of(token * (CHUNKS * CHUNK) + number * CHUNK, ALIGN)
    return first[:, None] + column[None, :], (token < num_tokens)[:, None] & (column < CHUNK)[None, :]


@triton.jit
def _read_columns(ptr, number: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk of a vector of this rank's features [1, BLOCK]."""
    column = tl.arange(0, BLOCK)
    return tl.load(ptr + number * CHUNK + column, mask=column < CHUNK, other=0).to(tl.float32)[None, :]


@triton.jit
def _add_moments(means, squares, PARTS: tl.constexpr, COUNT: tl.constexpr):
    """`pairwise_moments` of mf_train/model/sums.py: of parts of COUNT values each."""
    for level in tl.static_range(3):
        if PARTS >> (level + 1) > 0:
            next_means = ()
            next_squares = ()
            for pair in tl.static_range(PARTS >> (level + 1)):
                difference = means[2 * pair + 1] - means[2 * pair]
                between = difference * difference * ((COUNT << level) / 2)
                next_squares += (squares[2 * pair] + squares[2 * pair + 1] + between,)
                next_means += ((means[2 * pair] + means[2 * pair + 1]) / 2,)
            means = next_means
            squares = next_squares
    return means[0], squares[0]


@triton.jit
def _moments(tiles, CENTRED: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and sum of squared deviations of each token."""
    means = ()
    squares = ()
    for c in tl.static_range(CHUNKS):
        x = tiles[c].to(tl.float32)
        mean = tl.sum(x, axis=1)
        mean = mean / CHUNK if CENTRED else tl.zeros_like(mean)
        deviation = tl.where((tl.arange(0, BLOCK) < CHUNK)[None, :], x - mean[:, None], 0.0)
        means += (mean,)
        squares += (tl.sum(deviation * deviation, axis=1),)
    return _add_moments(means, squares, CHUNKS, CHUNK)


@triton.jit
def _gradient_sums(
    dys, xs, mean, rstd, weight_ptr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each token the sums of dy * weight and of dy * weight * (x - mean) * rstd."""
    plain = ()
    with_normal = ()
    for c in tl.static_range(CHUNKS):
        scaled = dys[c].to(tl.float32) * _read_columns(weight_ptr, c, CHUNK, BLOCK)
        normal = (xs[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
        plain += (tl.sum(scaled, axis=1),)
        with_normal += (tl.sum(scaled * normal, axis=1),)
    return add_pairs(plain, CHUNKS), add_pairs(with_normal, CHUNKS)


@triton.jit
def _read_sums(sums_ptr, token, num_tokens, rank: tl.constexpr):
    """The two sums of each token that a rank gave, of sums [ranks, num_tokens, 2]."""
    place = (num_tokens.to(tl.int64) * rank + token) * 2
    live = token < num_tokens
    return tl.load(sums_ptr + place, mask=live, other=0.0), tl.load(
        sums_ptr + place + 1, mask=live, other=0.0
    )


@triton.jit
def _write_sums(sums_ptr, token, num_tokens, first, second):
    tl.store(sums_ptr + token * 2, first, mask=token < num_tokens)
    tl.store(sums_ptr + token * 2 + 1, second, mask=token < num_tokens)


@triton.jit(do_not_specialize=["num_tokens"])
def _moments_kernel(
    x_ptr,
    sums_ptr,
    num_tokens,
    CENTRED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tiles = _read_chunks(x_ptr, token, num_tokens, CHUNKS, CHUNK, BLOCK, ALIGN)
    mean, squares = _moments(tiles, CENTRED, CHUNKS, CHUNK, BLOCK)
    _write_sums(sums_ptr, token, num_tokens, mean, squares)


@triton.jit(do_not_specialize=["num_tokens"])
def _normalise_kernel(
    x_ptr,
    sums_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    num_tokens,
    RANKS: tl.constexpr,
    EPSILON: tl.constexpr,
    CENTRED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """sums_ptr: [RANKS, num_tokens, 2], or None where the sums of these features are all there is to add."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    tiles = _read_chunks(x_ptr, token, num_tokens, CHUNKS, CHUNK, BLOCK, ALIGN)
    if sums_ptr is None:
        mean, squares = _moments(tiles, CENTRED, CHUNKS, CHUNK, BLOCK)
    else:
        means = ()
        parts = ()
        for rank in tl.static_range(RANKS):
            first, second = _read_sums(sums_ptr, token, num_tokens, rank)
            means += (first,)
            parts += (second,)
        mean, squares = _add_moments(means, parts, RANKS, CHUNKS * CHUNK)
    rstd = 1.0 / tl.sqrt(squares / (RANKS * CHUNKS * CHUNK) + EPSILON)
    tl.store(mean_ptr + token, mean, mask=token < num_tokens)
    tl.store(rstd_ptr + token, rstd, mask=token < num_tokens)
    for c in tl.static_range(CHUNKS):
        place, inside = _tile(token, num_tokens, c, CHUNKS, CHUNK, BLOCK, ALIGN)
        y = (
            (tiles[c].to(tl.float32) - mean[:, None])
            * rstd[:, None]
            * _read_columns(weight_ptr, c, CHUNK, BLOCK)
        )
        if bias_ptr is not None:
            y += _read_columns(bias_ptr, c, CHUNK, BLOCK)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _gradient_sums_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    sums_ptr,
    num_tokens,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mean = tl.load(mean_ptr + token, mask=token < num_tokens, other=0.0)
    rstd = tl.load(rstd_ptr + token, mask=token < num_tokens, other=0.0)
    dys = _read_chunks(dy_ptr, token, num_tokens, CHUNKS, CHUNK, BLOCK, ALIGN)
    xs = _read_chunks(x_ptr, token, num_tokens, CHUNKS, CHUNK, BLOCK, ALIGN)
    first, second = _gradient_sums(dys, xs, mean, rstd, weight_ptr, CHUNKS, CHUNK, BLOCK)
    _write_sums(sums_ptr, token, num_tokens, first, second)


@triton.jit(do_not_specialize=["num_tokens"])
def _gradients_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    sums_ptr,
    dx_ptr,
    parts_ptr,
    num_tokens,
    RANKS: tl.constexpr,
    CENTRED: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """dx, and each program's part of d weight, with CENTRED also of d bias: parts [programs, 1 or 2, features].

    sums_ptr: [RANKS, num_tokens, 2], or None where the sums of these features are all there is to add.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mean = tl.load(mean_ptr + token, mask=token < num_tokens, other=0.0)
    rstd = tl.load(rstd_ptr + token, mask=token < num_tokens, other=0.0)
    dys = _read_chunks(dy_ptr, token, num_tokens, CHUNKS, CHUNK, BLOCK, ALIGN)
    xs = _read_chunks(x_ptr, token, num_tokens, CHUNKS, CHUNK, BLOCK, ALIGN)
    if sums_ptr is None:
        plain, with_normal = _gradient_sums(dys, xs, mean, rstd, weight_ptr, CHUNKS, CHUNK, BLOCK)
    else:
        firsts = ()
        seconds = ()
        for rank in tl.static_range(RANKS):
            first, second = _read_sums(sums_ptr, token, num_tokens, rank)
            firsts += (first,)
            seconds += (second,)
        plain, with_normal = add_pairs(firsts, RANKS), add_pairs(seconds, RANKS)
    plain = plain / (RANKS * CHUNKS * CHUNK)
    with_normal = with_normal / (RANKS * CHUNKS * CHUNK)
    column = tl.arange(0, BLOCK)
    parts_ptr += tl.program_id(0).to(tl.int64) * (CHUNKS * CHUNK * (2 if CENTRED else 1))
    for c in tl.static_range(CHUNKS):
        place, inside = _tile(token, num_tokens, c, CHUNKS, CHUNK, BLOCK, ALIGN)
        dy = dys[c].to(tl.float32)
        normal = (xs[c].to(tl.float32) - mean[:, None]) * rstd[:, None]
        dx = dy * _read_columns(weight_ptr, c, CHUNK, BLOCK) - normal * with_normal[:, None]
        if CENTRED:
            dx -= plain[:, None]
        tl.store(dx_ptr + place, (dx * rstd[:, None]).to(dx_ptr.dtype.element_ty), mask=inside)
        tl.store(parts_ptr + c * CHUNK + column, tl.sum(dy * normal, axis=0), mask=column < CHUNK)
        if CENTRED:
            tl.store(parts_ptr + (CHUNKS + c) * CHUNK + column, tl.sum(dy, axis=0), mask=column < CHUNK)


def moments(x: Tensor, chunk: int, *, centred: bool) -> Tensor:
    """Mean and sum of squared deviations over the last dimension: [..., D] -> [..., 2] float32."""
    sums = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            _moments_kernel[_grid(x, chunk)](
                x.contiguous(), sums, _tokens(x), CENTRED=centred, **constants(x.shape[-1], chunk)
            )
    return sums


def normalise(
    x: Tensor, sums: Tensor | None, weight: Tensor, bias: Tensor | None, chunk: int, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [..., D] in x's dtype, mean and rstd [...] float32; sums [P, ..., 2]."""
    y = x.new_empty(x.shape)
    mean, rstd = x.new_empty((2, *x.shape[:-1]), dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            _normalise_kernel[_grid(x, chunk)](
                x.contiguous(),
                None if sums is None else sums.contiguous(),
                weight.contiguous(),
                None if bias is None else bias.contiguous(),
                y,
                mean,
                rstd,
                _tokens(x),
                RANKS=1 if sums is None else len(sums),
                EPSILON=epsilon,
                CENTRED=bias is not None,
                **constants(x.shape[-1], chunk),
            )
    return y, mean, rstd


def gradient_sums(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, chunk: int) -> Tensor:
    """Sums over the last dimension of dy * weight and of dy * weight * (x - mean) * rstd: [..., 2] float32."""
    sums = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    if x.numel():
        tensors = [t.contiguous() for t in (dy, x, mean, rstd, weight)]
        with torch.cuda.device_of(x):
            _gradient_sums_kernel[_grid(x, chunk)](
                *tensors, sums, _tokens(x), **constants(x.shape[-1], chunk)
            )
    return sums


def gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    chunk: int,
    *,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dx [..., D], d weight [D], d bias [D] or None; sums [P, ..., 2]."""
    dx = x.new_empty(x.shape)
    grid = _grid(x, chunk)
    parts = x.new_empty(*grid, 2 if centred else 1, x.shape[-1], dtype=torch.float32)
    if x.numel():
        tensors = [t.contiguous() for t in (dy, x, mean, rstd, weight)]
        with torch.cuda.device_of(x):
            _gradients_kernel[grid](
                *tensors,
                None if sums is None else sums.contiguous(),
                dx,
                parts,
                _tokens(x),
                RANKS=1 if sums is None else len(sums),
                CENTRED=centred,
                **constants(x.shape[-1], chunk),
            )
    of_parameters = column_sums(parts.flatten(1)).to(weight.dtype).view(parts.shape[1:])
    return dx, of_parameters[0], of_parameters[1] if centred else None


def constants(features: int, chunk: int) -> dict[str, Any]:
    """What is compiled in, and how. All but CHUNKS is the same on every number of ranks."""
    block = triton.next_power_of_2(chunk)
    return {
        "CHUNKS": features // chunk,
        "CHUNK": chunk,
        "BLOCK": block,
        "ALIGN": math.gcd(chunk, 16),
        "TOKENS": max(ELEMENTS // block, 1),
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()


def _grid(x: Tensor, chunk: int) -> tuple[int]:
    return (triton.cdiv(_tokens(x), constants(x.shape[-1], chunk)["TOKENS"]),)
