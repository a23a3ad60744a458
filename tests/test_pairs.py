"""The grids whose pairs the suite runs."""

from __future__ import annotations

import itertools

import pytest

from tests.pairs import in_pairs


@pytest.mark.parametrize("sizes", [(4, 3), (2, 5, 3), (12, 4, 3), (14, 4, 2, 3)], ids=str)
def test_every_pair_is_quick_and_every_combination_is_there(sizes: tuple[int, ...]) -> None:
    axes = [[f"{letter}{i}" for i in range(size)] for letter, size in zip("abcd", sizes, strict=False)]
    grid = in_pairs(*axes)
    assert [parameters.values for parameters in grid] == list(itertools.product(*axes))
    quick = [parameters.values for parameters in grid if not parameters.marks]
    for one, other in itertools.combinations(axes, 2):
        for pair in itertools.product(one, other):
            assert any(set(pair) <= set(values) for values in quick), pair
    least = max(len(one) * len(other) for one, other in itertools.combinations(axes, 2))
    assert least <= len(quick) <= 1.3 * least
