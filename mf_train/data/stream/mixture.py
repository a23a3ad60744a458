"""Which source a row comes from: exact shares in the long run, decided by counts alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """The fixed sequence of sources that keeps every source's count within about one of its share.

    Element n is the source with the largest deficit, share * (n + 1) - (times taken before); the first of
    equals. Stream s starts at element s, so streams that advance together are at different places of the
    sequence and each batch, too, has nearly the right shares.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # in integers, so that ties are the same everywhere; a weight counts as it is written, 0.1 as 1/10
        exact = [Fraction(repr(float(weight))) for weight in weights]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * denominator) for weight in exact]
        self._total = sum(self._weights)

    def starting_counts(self, start: int) -> list[int]:
        """How often each source stands among the first `start` elements."""
        counts = [0] * len(self._weights)
        for _ in range(start):
            counts[self.next_source(counts)] += 1
        return counts

    def next_source(self, counts: Sequence[int]) -> int:
        """The element that follows `counts`, the elements taken since the beginning of the sequence."""
        if len(counts) == 1:
            return 0
        position = sum(counts) + 1
        deficits = [
            weight * position - self._total * count
            for weight, count in zip(self._weights, counts, strict=True)
        ]
        return deficits.index(max(deficits))
