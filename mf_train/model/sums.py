"""Sums whose order does not depend on how a feature dimension is split over ranks.

A dimension is cut into at most 8 equal chunks. Each chunk is summed by itself, then neighbours are added in pairs
until one value is left. A tensor-parallel rank holds neighbouring chunks, a whole branch of that tree, so it sends
one partial result and the ranks' results are the tree's next level: the bits are the same for every number of ranks
that divides the number of chunks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # degrees are checked without torch
    from torch import Tensor

MAX_CHUNKS = 8


def num_chunks(size: int) -> int:
    """Chunks that a dimension of `size` is cut into: the largest power of two up to 8 that divides it."""
    return math.gcd(MAX_CHUNKS, size)


def pairwise_sum(parts: Tensor) -> Tensor:
    """Sum over the last dimension, a power of two long, by neighbouring pairs: [..., C] -> [...]."""
    while parts.shape[-1] > 1:
        parts = parts[..., 0::2] + parts[..., 1::2]
    return parts[..., 0]


def pairwise_moments(means: Tensor, squares: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of all, from those of C parts of `count` values each.

    means, squares: [..., C] -> [...], [...]. Pairwise update of Chan, Golub and LeVeque (1979); no cancellation.
    """
    while means.shape[-1] > 1:
        left, right = means[..., 0::2], means[..., 1::2]
        squares = squares[..., 0::2] + squares[..., 1::2] + (right - left).square() * (count / 2)
        means = (left + right) / 2
        count *= 2
    return means[..., 0], squares[..., 0]


def chunk_sums(x: Tensor, chunk: int) -> Tensor:
    """Sum over the last dimension by chunks of `chunk` values, then by pairs: [..., C * chunk] -> [...]."""
    return pairwise_sum(x.unflatten(-1, (-1, chunk)).sum(-1))


def chunk_moments(x: Tensor, chunk: int, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations over the last dimension, chunk by chunk and then by pairs.

    With `centred` False the deviations are from zero (RMSNorm) and the mean is zero.
    """
    chunks = x.unflatten(-1, (-1, chunk))
    if not centred:
        squares = pairwise_sum(chunks.square().sum(-1))
        return squares.new_zeros(squares.shape), squares
    means = chunks.sum(-1) / chunk
    squares = (chunks - means.unsqueeze(-1)).square().sum(-1)
    return pairwise_moments(means, squares, chunk)
