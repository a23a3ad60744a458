"""Intervals of fitted values, and whether the data identify them: bootstrap over configurations and their seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mf_train.study.fit import EXPONENT_BOUNDS, Array, Law, fit_law

T = TypeVar("T")
LEVEL = 0.9  # of the intervals
SAMPLES = 200
FEWEST_VALUES = 3  # different sizes, and numbers of tokens, below which an exponent is anybody's guess
WIDEST = 0.5  # an exponent's interval may reach this share of the exponent to either side on average


@dataclass(frozen=True)
class Point:
    """One configuration and the losses of its seeds."""

    x: tuple[float, ...]
    losses: tuple[float, ...]  # nats


@dataclass(frozen=True)
class Interval:
    """An estimate and the bootstrap's quantiles around it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int = 4) -> str:
        """Such as `0.5 [0.4, 0.6]`; the estimate alone where nothing could be drawn."""
        if math.isnan(self.low):
            return f"{self.value:.{digits}g}"
        return f"{self.value:.{digits}g} [{self.low:.{digits}g}, {self.high:.{digits}g}]"


@dataclass(frozen=True)
class LawFit:
    """A law with the intervals of its values, and what speaks against trusting them."""

    law: Law
    names: tuple[str, ...]  # of the quantities x
    floor: Interval
    coefficients: tuple[Interval, ...]
    exponents: tuple[Interval, ...]
    points: int
    runs: int
    samples: int  # bootstrap samples that could be fitted
    warnings: tuple[str, ...]


def expand(points: Sequence[Point]) -> tuple[Array, Array]:
    """x [n, j] and losses [n], a row a run."""
    rows = [(point.x, loss) for point in points for loss in point.losses]
    x, losses = zip(*rows, strict=True)
    return np.array(x, dtype=np.float64), np.array(losses, dtype=np.float64)


def resample(points: Sequence[Point], random: np.random.Generator) -> list[Point]:
    """As many configurations, drawn with replacement, and in each as many seeds, drawn with replacement."""
    drawn = [points[index] for index in random.integers(len(points), size=len(points))]
    return [resample_seeds(point, random) for point in drawn]


def resample_seeds(point: Point, random: np.random.Generator) -> Point:
    """As many seeds of one configuration, drawn with replacement."""
    seeds = random.integers(len(point.losses), size=len(point.losses))
    return Point(point.x, tuple(point.losses[i] for i in seeds))


def fit_with_intervals(
    points: Sequence[Point], names: Sequence[str], samples: int = SAMPLES, seed: int = 0
) -> LawFit:
    """Fit a law and bootstrap it. Raises ValueError where the points are fewer than its parameters."""
    if len(points) < 2 * len(names) + 1:
        raise ValueError(f"{len(points)} configurations cannot fix {2 * len(names) + 1} parameters")
    x, loss = expand(points)
    law = fit_law(x, loss)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples):
        sample_x, sample_loss = expand(resample(points, random))
        if any(len(np.unique(column)) < 2 for column in sample_x.T):
            continue  # such a sample says nothing about that exponent
        drawn.append(fit_law(sample_x, sample_loss, near=law))

    def intervals(key: str) -> tuple[Interval, ...]:
        found = zip(getattr(law, key), *(getattr(one, key) for one in drawn), strict=True)
        return tuple(interval(value, others) for value, *others in found)

    exponents = intervals("exponents")
    return LawFit(
        law=law,
        names=tuple(names),
        floor=interval(law.floor, [one.floor for one in drawn]),
        coefficients=intervals("coefficients"),
        exponents=exponents,
        points=len(points),
        runs=len(loss),
        samples=len(drawn),
        warnings=tuple(doubts(points, names, law, exponents, len(drawn), samples)),
    )


def doubts(
    points: Sequence[Point],
    names: Sequence[str],
    law: Law,
    exponents: Sequence[Interval],
    drawn: int,
    samples: int,
) -> list[str]:
    """Why an exponent is not identified. The criterion, for each quantity:

    at least FEWEST_VALUES different values; more configurations than parameters; the estimate is not at a bound of the
    search; the interval is not wider than 2 * WIDEST of the estimate; at least half of the bootstrap's samples could
    be fitted.
    """
    found = []
    parameters = 2 * len(names) + 1
    if len(points) <= parameters:
        found.append(
            f"{len(points)} configurations for {parameters} parameters: the fit cannot be told from the data"
        )
    for index, name in enumerate(names):
        values = len({point.x[index] for point in points})
        one = exponents[index]
        if values < FEWEST_VALUES:
            found.append(
                f"the exponent of {name} is not identified: {values} different values, {FEWEST_VALUES} are needed"
            )
        elif not EXPONENT_BOUNDS[0] * 1.01 < one.value < EXPONENT_BOUNDS[1] * 0.99:
            found.append(
                f"the exponent of {name} is not identified: {one.value:.3g} is the bound of the search"
            )
        elif not one.high - one.low <= 2 * WIDEST * one.value:
            found.append(
                f"the exponent of {name} is not identified: {LEVEL:.0%} of the bootstrap lie in "
                f"{one.low:.3g} to {one.high:.3g}, wider than {2 * WIDEST:g} of {one.value:.3g}; run a wider range "
                "or more seeds"
            )
    lowest = min(min(point.losses) for point in points)
    if law.floor < 0.01 * lowest:
        found.append(
            f"the floor {law.floor:.2g} is not identified: the data would be fitted as well without it"
        )
    if drawn < samples / 2:
        found.append(f"only {drawn} of {samples} bootstrap samples had two values of each quantity")
    return found


def interval(value: float, drawn: Sequence[float]) -> Interval:
    """The middle LEVEL of what was drawn; NaN where nothing was."""
    if not drawn:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def over_seeds(
    points: Sequence[Point], compute: Callable[[Sequence[Point]], T], samples: int = SAMPLES, seed: int = 0
) -> list[T]:
    """The results of `compute` on bootstrap samples of each point's seeds; empty where every point has one seed.

    The configurations are not drawn: a budget with three sizes would mostly lose one. Samples where `compute` raises
    ValueError are left out.
    """
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(samples if any(len(point.losses) > 1 for point in points) else 0):
        try:
            drawn.append(compute([resample_seeds(point, random) for point in points]))
        except ValueError:
            continue
    return drawn


def bootstrap_value(
    points: Sequence[Point],
    compute: Callable[[Sequence[Point]], float],
    samples: int = SAMPLES,
    seed: int = 0,
) -> Interval:
    """A value that `compute` takes from points, with its interval `over_seeds`. Raises ValueError where it does."""
    return interval(compute(points), over_seeds(points, compute, samples, seed))
