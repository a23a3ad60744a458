"""The ranking of predicted step times, against CPU seconds of real steps (benchmarks.plan_time)."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from benchmarks.plan_time import CONFIGS
from mf_train.planning.devices import find_device
from mf_train.planning.time import estimate_step
from tests.planning.configs import run_python


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
