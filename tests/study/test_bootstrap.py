"""Intervals hold the constants of synthetic data, and doubts are told where the data cannot identify them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from mf_train.study.bootstrap import Point, bootstrap_value, expand, fit_with_intervals, resample
from mf_train.study.fit import Law

LAW = Law(1.69, (406.4, 410.7), (0.34, 0.28))


def points(
    sizes: np.ndarray, tokens: np.ndarray, seeds: int = 3, noise: float = 2e-3, seed: int = 0
) -> list[Point]:
    random = np.random.default_rng(seed)
    found = []
    for size in sizes:
        for count in tokens:
            loss = LAW.predict(np.array([[size, count]]))[0] * np.exp(random.normal(0, noise, seeds))
            found.append(Point((float(size), float(count)), tuple(loss)))
    return found


SIZES, TOKENS = np.geomspace(1e6, 1e9, 5), np.geomspace(1e7, 1e11, 5)
WIDE = points(SIZES, TOKENS)


def test_intervals_hold_the_constants() -> None:
    fit = fit_with_intervals(WIDE, ("parameters", "tokens"), samples=60)
    for one, true in zip([fit.floor, *fit.exponents], [LAW.floor, *LAW.exponents], strict=True):
        slack = 0.5 * (one.high - one.low)
        assert one.low <= one.value <= one.high
        assert one.low - slack <= true <= one.high + slack
    assert fit.warnings == () and (fit.points, fit.runs, fit.samples) == (25, 75, 60)


def test_more_noise_gives_wider_intervals() -> None:
    def width(noise: float) -> float:
        drawn = points(SIZES[:4], TOKENS[:4], noise=noise)
        one = fit_with_intervals(drawn, ("parameters", "tokens"), samples=40).exponents[0]
        return one.high - one.low

    assert width(5e-3) > 2 * width(5e-4)


UNIDENTIFIED = {
    "two sizes": (points(SIZES[[0, -1]], TOKENS), "exponent of parameters is not identified: 2"),
    "two token counts": (points(SIZES, TOKENS[[0, -1]]), "exponent of tokens is not identified: 2"),
    "a narrow range": (
        points(np.geomspace(1e8, 1.1e8, 3), TOKENS[:4], noise=0.02),
        "exponent of parameters is not",
    ),
    "one token count": (points(SIZES, TOKENS[:1]), "exponent of tokens is not identified: 1"),
}


@pytest.mark.parametrize(("drawn", "words"), UNIDENTIFIED.values(), ids=UNIDENTIFIED)
def test_data_that_cannot_identify_are_doubted(drawn: list[Point], words: str) -> None:
    fit = fit_with_intervals(drawn, ("parameters", "tokens"), samples=30)
    assert any(words in warning for warning in fit.warnings), fit.warnings


def test_too_few_cells_are_refused_whatever_their_seeds() -> None:
    with pytest.raises(ValueError, match="4 configurations cannot fix 5"):
        fit_with_intervals(points(SIZES[:2], TOKENS[:2], seeds=9), ("N", "D"))


def test_a_sample_draws_cells_and_seeds_with_replacement() -> None:
    drawn = resample(WIDE, np.random.default_rng(0))
    assert len(drawn) == len(WIDE) and len({point.x for point in drawn}) < len(WIDE)
    seeds = {point.x: set(point.losses) for point in WIDE}
    assert all(set(point.losses) <= seeds[point.x] and len(point.losses) == 3 for point in drawn)
    assert any(len(set(point.losses)) < 3 for point in drawn)
    assert expand(drawn)[0].shape == (75, 2)


def test_the_interval_of_a_value_is_over_seeds_and_leaves_out_samples_that_have_none() -> None:
    def mean(drawn: Sequence[Point]) -> float:
        assert [point.x for point in drawn] == [point.x for point in WIDE]  # every cell stays
        if len(set(drawn[0].losses)) < 2:
            raise ValueError
        return float(expand(drawn)[1].mean())

    one = bootstrap_value(WIDE, mean, samples=50)
    assert one.low < one.value < one.high
    alone = [Point(point.x, point.losses[:1]) for point in WIDE]
    assert math.isnan(bootstrap_value(alone, lambda drawn: float(expand(drawn)[1].mean())).low)
