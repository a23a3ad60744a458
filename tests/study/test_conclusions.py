"""What a study's report says first, against losses whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from pandas import DataFrame

from mf_train.study.analysis import Measured, analyse, measure
from mf_train.study.conclusions import conclude, list_values
from tests.study.test_analysis import row, table

RATES = ["0.001", "0.01", "0.1"]


def conclusions(rows: list[dict[str, str]]) -> list[str]:
    measured: list[Measured] = measure(DataFrame(rows), "flops", "parameters", "model.kind")
    series = analyse(measured, "flops", "parameters", samples=20)
    return list(conclude(series, measured, {"learning_rate": RATES}, "flops"))


def rated(losses: dict[str, float], seeds: int, noise: float) -> list[dict[str, str]]:
    """Two kinds, the dense one 0.5 nats above the other, at each rate's loss and with noise of the rate and seed."""
    random = np.random.default_rng(1)
    return [
        row(kind, 1e6, 1e8, seed, loss + above + random.normal(0, noise), **{
            "axis.learning_rate": rate, "axis.kind": kind, "cell": f"{kind}{rate}{seed}",
        })
        for kind, above in (("memoryformer", 0.0), ("dense", 0.5))
        for rate, loss in losses.items()
        for seed in range(seeds)
    ]  # fmt: skip


def test_the_best_value_of_each_axis_is_named() -> None:
    best, rate, kind = conclusions(rated({"0.001": 4.0, "0.01": 3.0, "0.1": 3.5}, seeds=3, noise=1e-4))
    assert best.startswith("The lowest validation loss is 3.000") or best.startswith(
        "The lowest validation loss is 2.999"
    )
    assert "(the mean of 3 seeds), of learning_rate 0.01, kind memoryformer: 1,000,000 parameters" in best
    assert rate.startswith(
        f"learning_rate: 0.01 has the lowest loss in 2 of 2 comparisons over {', '.join(RATES)};"
    )
    assert "on average -1.000 nats per token from 0.001" in rate and "leaves out 0 in 2 of 2." in rate
    assert kind.startswith(
        "kind: memoryformer has the lowest loss in 3 of 3 comparisons; on average -0.500 nats"
    )


def test_a_best_value_at_the_end_of_its_range_is_said() -> None:
    _, rate, _ = conclusions(rated({"0.001": 4.0, "0.01": 3.0, "0.1": 2.5}, seeds=2, noise=0))
    assert "0.1 has the lowest" in rate and rate.endswith("the best value may lie beyond.")


@pytest.mark.parametrize(
    ("seeds", "words"),
    [(1, "with one seed, so that the noise is not known"), (2, "leaves out 0 in 0 of 2")],
    ids=str,
)
def test_noise_is_not_taken_for_a_difference(seeds: int, words: str) -> None:
    _, rate, _ = conclusions(rated(dict.fromkeys(RATES, 4.0), seeds, noise=0.05))
    assert words in rate


def test_exponents_are_said_only_where_nothing_doubts_them() -> None:
    lines = conclusions(table(("dense",)))
    assert any(
        "in L(N, D) the exponent of tokens is 0.3" in line and "the best size grows" in line for line in lines
    )
    lines = conclusions(table(("dense",), noise=0.3))
    assert not any("exponent of" in line for line in lines)
    assert any("no exponent is identified: " in line and line.endswith("listed below.") for line in lines)


def test_nothing_measured_is_no_conclusion() -> None:
    assert list(conclude([], [], {}, "flops")) == []


def test_many_values_are_shortened() -> None:
    assert list_values([str(i) for i in range(20)]) == "0, 1, 2, 3, 4, 5, 6 ... 19 (20 values)"
