"""The learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mf_train.config import Config, OptimizerConfig, ScheduleConfig, TrainingConfig
from mf_train.config.phases import phases_of
from mf_train.config.schedule import Rewarm, learning_rate, rate_of


def test_cosine_with_warm_up() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10, minimum_fraction=0.01)
    rates = [learning_rate(step, 110, 2e-3, schedule) for step in range(1, 111)]
    assert rates[:10] == pytest.approx([2e-4 * step for step in range(1, 11)])
    for step in range(11, 111):
        expected = 2e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * (step - 10) / 100)) / 2)
        assert rates[step - 1] == pytest.approx(expected, rel=1e-12)
    assert max(rates) == rates[9] == 2e-3
    assert rates[-1] == pytest.approx(2e-5)


def test_constant_with_the_default_warm_up_of_one_percent() -> None:
    schedule = ScheduleConfig(kind="constant")
    assert learning_rate(1, 300, 3.0, schedule) == pytest.approx(1.0)
    assert {learning_rate(step, 300, 3.0, schedule) for step in range(3, 301)} == {3.0}


def test_linear() -> None:
    schedule = ScheduleConfig(kind="linear", warmup_steps=4, minimum_fraction=0.1)
    rates = [learning_rate(step, 24, 2.0, schedule) for step in range(1, 25)]
    assert rates == pytest.approx([0.5, 1, 1.5, *np.linspace(2, 0.2, 21)])


@pytest.mark.parametrize("keys", [{"decay_steps": 30}, {"decay_fraction": 0.3}])
def test_warmup_stable_decay(keys: dict[str, Any]) -> None:
    schedule = ScheduleConfig(kind="warmup_stable_decay", warmup_steps=5, minimum_fraction=0.0, **keys)
    rates = [learning_rate(step, 100, 3.0, schedule) for step in range(1, 101)]
    assert rates == pytest.approx([0.6, 1.2, 1.8, 2.4, *[3.0] * 65, *np.linspace(3, 0, 31)])


def test_inverse_square_root() -> None:
    schedule = ScheduleConfig(kind="inverse_sqrt", warmup_steps=100)
    # Vaswani et al. 2017, equation 3, whose peak is (features * warm-up) ** -0.5
    features, warmup = 512, 100
    for step in (1, 50, 100, 101, 400, 10_000):
        expected = features**-0.5 * min(step**-0.5, step * warmup**-1.5)
        rate = learning_rate(step, 20_000, (features * warmup) ** -0.5, schedule)
        assert rate == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "warmup_stable_decay"])
def test_the_last_step_has_the_lowest_rate(kind: str) -> None:
    for steps in (2, 3, 10, 99):
        schedule = ScheduleConfig(kind=kind, minimum_fraction=0.25, decay_fraction=0.5)  # type: ignore[arg-type]
        rates = [learning_rate(step, steps, 1.0, schedule) for step in range(1, steps + 1)]
        assert rates[-1] == pytest.approx(0.25)
        assert max(rates) == 1.0
        assert rates == sorted(rates, reverse=True)  # one step of warm-up, at the peak


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_edges(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=0)  # type: ignore[arg-type]
    assert learning_rate(1, 1, 1.0, schedule) == pytest.approx(0.01 if kind == "cosine" else 1.0)
    only_warm_up = ScheduleConfig(kind=kind, warmup_steps=5)  # type: ignore[arg-type]
    assert learning_rate(5, 5, 1.0, only_warm_up) == 1.0
    assert learning_rate(3, 5, 1.0, only_warm_up) == pytest.approx(0.6)


def test_a_line_to_another_schedule() -> None:
    schedule = ScheduleConfig(kind="cosine", warmup_steps=10)
    config = Config(
        schedule=schedule, training=TrainingConfig(steps=50), optimizer=OptimizerConfig(learning_rate=2.0)
    )
    (phase,) = phases_of(config)
    for after in (3, 20, 45):  # the last one ends after the run
        rates = [rate_of(phase, step, Rewarm(after, 0.5)) for step in range(after, 61)]
        end = learning_rate(after + 10, 50, 2.0, schedule)
        assert rates[:11] == pytest.approx(np.linspace(0.5, end, 11))
        assert rates[10:] == [learning_rate(step, 50, 2.0, schedule) for step in range(after + 10, 61)]
    assert [rate_of(phase, step) for step in (1, 50)] == [
        learning_rate(step, 50, 2.0, schedule) for step in (1, 50)
    ]
