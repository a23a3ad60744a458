"""Fits against synthetic data whose constants are known."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.optimize import check_grad

from mf_train.study import fit
from mf_train.study.fit import Law, fit_law, fit_parabola, fit_power

# Chinchilla's own constants, other exponents, a law of two equal terms, a low floor.
LAWS = [
    Law(1.69, (406.4, 410.7), (0.34, 0.28)),
    Law(1.82, (482.0, 2085.4), (0.35, 0.37)),
    Law(0.5, (30.0, 12.0), (0.2, 0.15)),
    Law(2.5, (4000.0, 900.0), (0.6, 0.45)),
]
SIZES = np.geomspace(5e5, 5e8, 7)
TOKENS = np.geomspace(2e6, 2e10, 7)


def grid(sizes: np.ndarray = SIZES, tokens: np.ndarray = TOKENS) -> np.ndarray:
    return np.array([(size, count) for size in sizes for count in tokens])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: str(law.exponents))
def test_exact_data_give_the_constants_back(law: Law) -> None:
    x = grid()
    found = fit_law(x, law.predict(x))
    assert found.exponents == pytest.approx(law.exponents, rel=2e-3)
    assert found.floor == pytest.approx(law.floor, rel=2e-3)
    assert found.coefficients == pytest.approx(law.coefficients, rel=3e-2)
    assert found.error < 1e-5


@pytest.mark.parametrize("law", LAWS[:2], ids=lambda law: str(law.exponents))
def test_noisy_data_give_the_exponents_back(law: Law) -> None:
    x = np.repeat(grid(), 3, axis=0)
    noise = np.exp(np.random.default_rng(1).normal(0, 3e-3, len(x)))
    found = fit_law(x, law.predict(x) * noise)
    assert found.exponents == pytest.approx(law.exponents, abs=0.02)
    assert found.floor == pytest.approx(law.floor, rel=0.03)


def test_outliers_and_units_move_the_fit_little() -> None:
    law, x = LAWS[0], grid()
    loss = law.predict(x)
    assert fit_law(x * 1e6, loss).exponents == pytest.approx(fit_law(x, loss).exponents, rel=1e-3)
    loss[[5, 20, 33]] *= 1.3  # runs that diverged
    assert fit_law(x, loss).exponents == pytest.approx(law.exponents, abs=0.01)


def test_a_law_of_one_quantity() -> None:
    law = Law(2.0, (50.0,), (0.25,))
    x = np.geomspace(1e3, 1e9, 10)[:, None]
    found = fit_law(x, law.predict(x))
    assert found.exponents == pytest.approx((0.25,), rel=1e-3) and found.floor == pytest.approx(2.0, rel=1e-3)


def test_the_gradient_is_that_of_the_value() -> None:
    random = np.random.default_rng(0)
    z, target = random.normal(size=(9, 2)), random.normal(1, 0.1, size=9)
    at = np.array([0.3, -0.2, 0.1, 0.4, 0.7])
    for delta in (1e-3, 10.0):  # all outside the parabola's part, all inside
        both = partial(fit._huber, z=z, log_loss=target, delta=delta)
        slope = both(at)[1]
        error = check_grad(lambda p, both=both: both(p)[0], lambda p, both=both: both(p)[1], at)
        assert error < 1e-4 * np.linalg.norm(slope)


@pytest.mark.parametrize(
    ("x", "loss", "words"),
    [
        (grid()[:4], np.ones(4), "4 points cannot fix 5"),
        (grid(), np.full(49, np.nan), "above 0"),
        (-grid(), np.ones(49), "above 0"),
    ],
)
def test_what_cannot_be_fitted_is_said(x: np.ndarray, loss: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fit_law(x, loss)


def test_a_parabola_gives_its_minimum_back() -> None:
    x = np.geomspace(1e6, 1e9, 6)
    squares = np.log(x / 3e7) ** 2
    found = fit_parabola(1e18, x, 0.05 * squares + 2.5)
    assert found.best == pytest.approx(3e7) and found.lowest == pytest.approx(2.5) and found.inside
    assert found.predict(x[:1])[0] == pytest.approx(0.05 * squares[0] + 2.5)
    assert not fit_parabola(1e18, x[:3], 0.05 * squares[:3] + 2.5).inside  # 3e7 is above these
    with pytest.raises(ValueError, match="no minimum"):
        fit_parabola(1e18, x, 3 - 0.05 * squares)
    with pytest.raises(ValueError, match="three sizes"):
        fit_parabola(1e18, x[:2], np.ones(2))


def test_isoflop_minima_follow_the_law_s_exponent() -> None:
    """For L = E + A/N^a + B/D^b and C = 6 N D the best N grows as C^(b / (a + b)) (Hoffmann et al. 2022, eq. 4)."""
    law = LAWS[0]
    a, b = law.exponents
    factor = (a * law.coefficients[0] / (b * law.coefficients[1])) ** (1 / (a + b))
    budgets, best = [1e17, 1e18, 1e19, 1e20], []
    for budget in budgets:
        middle = factor * (budget / 6) ** (b / (a + b))
        sizes = middle * np.geomspace(0.4, 2.5, 7)
        losses = law.predict(np.column_stack([sizes, budget / 6 / sizes]))
        best.append(fit_parabola(budget, sizes, losses).best)
    assert fit_power(budgets, best)[1] == pytest.approx(b / (a + b), abs=0.005)
