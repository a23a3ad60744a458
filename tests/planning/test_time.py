"""The ranking of predicted step times, against CPU seconds of real steps (benchmarks.plan_time)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.plan_time import CONFIGS
from mf_train.model.counts import count_parameters
from mf_train.planning.devices import find_device
from mf_train.planning.time import StepTime, estimate_step
from mf_train.planning.work import step_bytes
from tests.planning.configs import SMALL, make_config, run_python
from tests.training.runs import REPOSITORY


def test_the_ranked_configurations_lie_apart() -> None:
    seconds = sorted(estimate_step(config, 1, 1, find_device("cpu")).seconds for config in CONFIGS.values())
    assert len(seconds) >= 6
    assert all(later / earlier >= 1.5 for earlier, later in pairwise(seconds))


@pytest.mark.slow
def test_the_ranking_is_that_of_real_steps() -> None:
    said = run_python("-m", "benchmarks.plan_time")
    assert "ranking exact" in said, said


def test_a_cpu_adds_launches_and_a_gpu_hides_them() -> None:
    config, cpu = CONFIGS["tau 8, wide"], find_device("cpu")
    assert config.parallel.tensor == 1
    for kind, hidden in (("cpu", False), ("cuda", True)):
        device = replace(cpu, kind=kind, launch=1e-9)
        slower = replace(device, launch=1e-6)
        change = estimate_step(config, 1, 1, slower).seconds - estimate_step(config, 1, 1, device).seconds
        assert (change == 0) == hidden


MOMENTS = REPOSITORY / "benchmarks" / "results" / "2026-11-30-moments.txt"


def seconds(step: StepTime) -> dict[str, float]:
    return {part.name: part.seconds for part in step.parts}


def measured_updates() -> dict[tuple[str, ...], float]:
    """Times of updates against float32's, by kinds of moments and master: the last column of the benchmark's table."""
    lines = [line.rsplit(maxsplit=3) for line in MOMENTS.read_text().splitlines() if line.count(", ") == 2]
    return {tuple(words[0].split(", ")): float(words[-1]) for words in lines if words[-1][0].isdigit()}


@pytest.mark.parametrize("held", measured_updates(), ids=", ".join)
def test_an_update_takes_longer_as_measured(held: tuple[str, str, str]) -> None:
    """AdamW passes over 28 bytes a number in float32; what is beside it is for none of the kinds."""
    config = make_config(SMALL, 4, 2, 1, 1, "bfloat16", held)
    cpu = find_device("cpu")
    extra = seconds(estimate_step(config, 1, 1, cpu)).get("update of compact numbers", 0.0) * cpu.copy
    assert 1 + extra / 28 / count_parameters(SMALL).total == pytest.approx(measured_updates()[held], rel=0.2)


def test_pieces_are_no_bytes_that_a_step_moves() -> None:
    """A split master is the weight's other half, so 2 bytes of the weight are not written apart."""
    plain, split = (
        make_config(SMALL, 4, 2, 1, 1, "bfloat16", ("float32", "float32", master))
        for master in ("float32", "split")
    )
    assert step_bytes(plain) - step_bytes(split) == 2 * count_parameters(SMALL).total


def test_what_is_offloaded_is_updated_at_the_hosts_rate() -> None:
    """On two data-parallel ranks each updates half: 46 bytes a number there, and its gradient goes there."""
    config = make_config(SMALL, 4, 2, 1, 1, "bfloat16")
    away = replace(config, parallel=replace(config.parallel, offload="optimizer"))
    device = replace(find_device("h100"), host=1e9, copy=1e12, launch=1e-9)
    there, gone = (seconds(estimate_step(each, 1, 2, device)) for each in (config, away))
    own = count_parameters(SMALL).total / 2
    assert gone.pop("update") == pytest.approx(46 * own / 1e9)
    assert gone.pop("gradients to host") == pytest.approx(4 * own / 1e9)
    there.pop("update")
    assert gone == there
    cpu = find_device("cpu")
    assert estimate_step(away, 1, 2, cpu) == estimate_step(config, 1, 2, cpu)
