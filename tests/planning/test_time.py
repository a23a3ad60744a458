"""The ranking of predicted step times, against CPU seconds of real steps (benchmarks.plan_time)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.plan_time import CONFIGS
from mf_train.planning.devices import find_device
from mf_train.planning.time import estimate_step

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_ranked_configurations_lie_apart() -> None:
    seconds = sorted(estimate_step(config, 1, 1, find_device("cpu")).seconds for config in CONFIGS.values())
    assert len(seconds) >= 6
    assert all(later / earlier >= 1.5 for earlier, later in pairwise(seconds))


@pytest.mark.slow
def test_the_ranking_is_that_of_real_steps() -> None:
    command = [sys.executable, "-m", "benchmarks.plan_time"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert "ranking exact" in done.stdout, done.stdout


def test_a_cpu_adds_launches_and_a_gpu_hides_them() -> None:
    config, cpu = CONFIGS["tau 8, wide"], find_device("cpu")
    assert config.parallel.tensor == 1
    for kind, hidden in (("cpu", False), ("cuda", True)):
        device = replace(cpu, kind=kind, launch=1e-9)
        slower = replace(device, launch=1e-6)
        change = estimate_step(config, 1, 1, slower).seconds - estimate_step(config, 1, 1, device).seconds
        assert (change == 0) == hidden
