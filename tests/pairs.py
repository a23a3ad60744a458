"""Grids of parameters of which the suite runs every pair of values, and the drills every combination."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def in_pairs(*axes: Sequence[Any]) -> list[Any]:
    """Every combination of one value of each axis, as parameters of a test.

    Two values of different axes meet in at least one combination that is not marked slow. Those are chosen greedily,
    the first of the most new pairs, so that they are few and always the same.
    """
    grid = list(itertools.product(*(range(len(axis)) for axis in axes)))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in grid}
    missing = set().union(*pairs.values())
    chosen = set()
    while missing:
        best = max(grid, key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, row, strict=True)),
            marks=[] if row in chosen else [pytest.mark.slow],
        )
        for row in grid
    ]
