"""The learning rate of every step."""

from __future__ import annotations

import math

import pytest

from mf_train.config import ScheduleConfig
from mf_train.training.schedule import learning_rate


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


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_edges(kind: str) -> None:
    schedule = ScheduleConfig(kind=kind, warmup_steps=0)  # type: ignore[arg-type]
    assert learning_rate(1, 1, 1.0, schedule) == pytest.approx(0.01 if kind == "cosine" else 1.0)
    only_warm_up = ScheduleConfig(kind=kind, warmup_steps=5)  # type: ignore[arg-type]
    assert learning_rate(5, 5, 1.0, only_warm_up) == 1.0
    assert learning_rate(3, 5, 1.0, only_warm_up) == pytest.approx(0.6)
