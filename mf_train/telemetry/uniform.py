"""What a code that reads all rows alike would show after a few reads, when rows are unread by chance."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

_DEVIATIONS = 12  # of a row's count from its mean, beyond which its probability is nothing in float64


@dataclass(frozen=True)
class Uniform:
    """Expected numbers of a table of 2**tau rows after n reads, each of a row at random."""

    rows_read: float  # 1 - (1 - 2**-tau)**n
    entropy: float  # of the shares that were counted, as a share of tau bits
    largest_share: float  # of the most read row, its count taken as independent of the others'


@lru_cache(maxsize=64)
def uniform_code(reads: int, rows: int) -> Uniform:
    """Exact for the first two up to rounding; a row's count is binomial (reads, 1 / rows)."""
    if reads == 0:
        return Uniform(0.0, 0.0, 0.0)
    mean = reads / rows
    width = _DEVIATIONS * math.sqrt(mean) + 2 * _DEVIATIONS
    low, high = max(0, int(mean - width)), min(reads, int(mean + width) + 1)
    count = torch.arange(low, high + 1, dtype=torch.float64)
    probability = _binomial(count, reads, rows)
    # E[H] = log n - (rows / n) E[c log c]
    entropy = math.log(reads) - rows / reads * (probability * torch.special.xlogy(count, count)).sum().item()
    # E[max] = sum over c of P(max > c), and P(max <= c) = P(count <= c) ** rows
    largest = low + (1 - probability.cumsum(0).clamp(max=1)[:-1] ** rows).sum().item()
    return Uniform(
        rows_read=-math.expm1(reads * math.log1p(-1 / rows)),
        entropy=max(entropy, 0.0) / math.log(rows),
        largest_share=largest / reads,
    )


def _binomial(count: Tensor, reads: int, rows: int) -> Tensor:
    """Probability of each count; scaled to sum up to 1, which lgamma of large numbers misses."""
    left = reads - count
    ways = -torch.lgamma(count + 1) - torch.lgamma(left + 1)
    logs = ways - count * math.log(rows) + left * math.log1p(-1 / rows)
    return (logs - logs.max()).softmax(0)
