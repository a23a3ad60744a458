"""Fits of scaling laws: loss = floor + sum over j of coefficient_j / x_j ** exponent_j, and IsoFLOP parabolas.

With x = (N, D) this is equation 2 of Hoffmann et al. 2022 (arXiv 2203.15556), fitted as in their appendix D.2: the
Huber loss of the logarithms' differences, minimised by L-BFGS from several starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, appendix D.2
EXPONENT_BOUNDS = (0.01, 3.0)
_LOWEST_LOG_FLOOR = -12.0
_STARTS = 6  # of L-BFGS: the best points of the grid
_GRID = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0, 1.3, 1.8, 2.5)


@dataclass(frozen=True)
class Law:
    """loss = floor + sum_j coefficients[j] / x_j ** exponents[j]; `error` is the mean of |log difference|."""

    floor: float  # E, nats
    coefficients: tuple[float, ...]  # A, B
    exponents: tuple[float, ...]  # a, b
    error: float = 0.0

    def predict(self, x: Array) -> Array:
        """Losses [n] of points [n, j]."""
        terms = np.exp(np.log(self.coefficients) - np.log(x) * np.asarray(self.exponents))
        return np.asarray(self.floor + terms.sum(axis=1), dtype=np.float64)


@dataclass(frozen=True)
class Parabola:
    """loss = curvature * (log x - log best)^2 + lowest, of the runs at one budget."""

    budget: float
    curvature: float
    best: float  # the x of the lowest loss
    lowest: float  # nats
    inside: bool  # whether `best` lies between the smallest and the largest x that were run

    def predict(self, x: Array) -> Array:
        """Losses of sizes x."""
        return np.asarray(self.curvature * np.log(x / self.best) ** 2 + self.lowest, dtype=np.float64)


def fit_law(x: Array, loss: Array, delta: float = HUBER_DELTA, near: Law | None = None) -> Law:
    """The law of n points x [n, j] with their losses [n]; `near` is one more start, for bootstrap samples.

    Raises ValueError where there are fewer points than parameters, or a value is not a number above 0.
    """
    points, terms = x.shape
    if points < 2 * terms + 1:
        raise ValueError(f"{points} points cannot fix {2 * terms + 1} parameters")
    if not (np.isfinite(x).all() and np.isfinite(loss).all() and (x > 0).all() and (loss > 0).all()):
        raise ValueError("sizes and losses must be numbers above 0")
    logs = np.log(x)
    centre = logs.mean(axis=0)  # exponents and coefficients depend on each other less around the middle
    starts = _grid_starts(logs - centre, loss)[: _STARTS if near is None else 1]
    if near is not None:
        exponents = np.array(near.exponents)
        starts.append(_pack(near.floor, np.log(near.coefficients) - exponents * centre, exponents))
    best = min(
        (_polish(start, logs - centre, np.log(loss), delta) for start in starts), key=lambda found: found[0]
    )
    floor, scale, exponents = _unpack(best[1], terms)
    law = Law(
        floor=float(np.exp(floor)),
        coefficients=tuple(float(value) for value in np.exp(scale + exponents * centre)),
        exponents=tuple(float(value) for value in exponents),
    )
    error = float(np.abs(np.log(law.predict(x) / loss)).mean())
    return Law(law.floor, law.coefficients, law.exponents, error)


def fit_parabola(budget: float, x: Array, loss: Array) -> Parabola:
    """The parabola of loss over log x. Raises ValueError with fewer than three sizes, or where it has no minimum."""
    if len(np.unique(x)) < 3:
        raise ValueError(
            f"budget {budget:.3g}: a parabola needs three sizes, and there are {len(np.unique(x))}"
        )
    logs = np.log(x)
    middle = logs.mean()
    curvature, slope, constant = np.polyfit(logs - middle, loss, 2)
    if curvature <= 0:
        raise ValueError(f"budget {budget:.3g}: the losses have no minimum over the sizes that were run")
    offset = -slope / (2 * curvature)
    best = float(np.exp(np.clip(middle + offset, -600, 600)))  # noise can make the curvature almost 0
    lowest = float(constant + slope * offset / 2)
    return Parabola(float(budget), float(curvature), best, lowest, bool(x.min() <= best <= x.max()))


def fit_power(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(coefficient, exponent) of y = coefficient * x ** exponent, by least squares of the logarithms.

    Raises ValueError with fewer than two different x.
    """
    if len(set(x)) < 2:
        raise ValueError("a power law needs two different budgets")
    exponent, constant = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(constant)), float(exponent)


def student_quantile(level: float, freedom: int) -> float:
    """The quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, level))


def _grid_starts(z: Array, loss: Array) -> list[Array]:
    """Parameters for each pair of exponents of a grid, best first; the rest is then a linear problem."""
    from scipy.optimize import nnls

    found = []
    weight = 1 / loss
    for exponents in itertools.product(_GRID, repeat=z.shape[1]):
        columns = np.column_stack([np.ones(len(z)), np.exp(-z * np.array(exponents))])
        amounts, distance = nnls(columns * weight[:, None], loss * weight)
        amounts = np.maximum(amounts, 1e-5)
        found.append((float(distance), _pack(amounts[0], np.log(amounts[1:]), np.array(exponents))))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])]


def _polish(start: Array, z: Array, log_loss: Array, delta: float) -> tuple[float, Array]:
    from scipy.optimize import minimize

    terms = z.shape[1]
    bounds = [
        (_LOWEST_LOG_FLOOR, float(log_loss.min())),
        *[(-40.0, 40.0)] * terms,
        *[EXPONENT_BOUNDS] * terms,
    ]
    lowest, highest = np.array(bounds).T
    start = np.clip(start, lowest, highest)
    # Tolerances far below the defaults: stopping early is what Besiroglu et al. 2024 (arXiv 2404.10102) found wrong
    # with the published fit. The sum is divided by delta^2, so that it does not look flat to the tolerances.
    options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-13, "gtol": 1e-9, "maxcor": 20}
    found = minimize(
        _huber, start, (z, log_loss, delta), method="L-BFGS-B", jac=True, bounds=bounds, options=options
    )
    return float(found.fun), np.asarray(found.x, dtype=np.float64)


def _huber(parameters: Array, z: Array, log_loss: Array, delta: float) -> tuple[float, Array]:
    """Sum of the Huber losses of log(prediction) - log(loss), over delta^2, and its gradient."""
    floor, scale, exponents = _unpack(parameters, z.shape[1])
    logs = np.column_stack([np.full(len(z), floor), scale - exponents * z])
    top = logs.max(axis=1, keepdims=True)
    shares = np.exp(logs - top)
    total = shares.sum(axis=1, keepdims=True)
    residual = ((top + np.log(total))[:, 0] - log_loss) / delta
    shares /= total
    small = np.abs(residual) <= 1
    value = np.where(small, residual**2 / 2, np.abs(residual) - 0.5).sum()
    slope = np.clip(residual, -1, 1)[:, None] / delta
    by_scale = (slope * shares).sum(axis=0)
    by_exponent = (-slope * shares[:, 1:] * z).sum(axis=0)
    return float(value), np.concatenate([by_scale, by_exponent])


def _pack(floor: float, scale: Array, exponents: Array) -> Array:
    return np.concatenate([[np.log(floor)], scale, exponents])


def _unpack(parameters: Array, terms: int) -> tuple[float, Array, Array]:
    return float(parameters[0]), parameters[1 : 1 + terms], parameters[1 + terms :]
