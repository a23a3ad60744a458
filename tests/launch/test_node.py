"""What the ends of a node's ranks mean, and the variables that say which node it is."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

import pytest

from mf_train.errors import UserError
from mf_train.launch.logs import Ending
from mf_train.launch.node import Node, Ranks, find_node
from tests.training.runs import REPOSITORY, environment

SRUN = {"SLURM_NODEID": "1", "SLURM_STEP_NUM_NODES": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "10123"}


def ended(status: int, time: float = 0.0, by_agent: bool = False) -> Ending:
    return Ending(0, "n1", status, time, by_agent)


@pytest.mark.parametrize(
    ("endings", "status", "status_after_a_request"),
    [
        ([ended(0), ended(0)], 0, 0),
        ([ended(0), ended(75)], 75, 75),
        ([ended(75), ended(1, 5), ended(137, 3)], 137, 137),
        ([ended(1, 3), ended(2, 3)], 2, 2),  # seen at the same moment
        ([ended(2), ended(143, by_agent=True)], 2, 2),
        ([ended(75), ended(137, by_agent=True)], 75, 75),
        ([ended(143, by_agent=True)], 1, 1),  # because of another node, whose status counts
        ([ended(138), ended(143)], 138, 75),  # they did not listen yet
        ([ended(138), ended(1, 1)], 138, 1),
    ],
)
def test_the_status_of_a_node(endings: list[Ending], status: int, status_after_a_request: int) -> None:
    assert Ranks("n1", grace=60, endings=endings).status() == status
    asked = Ranks("n1", grace=60, endings=endings, stop=signal.SIGUSR1)
    assert asked.status() == status_after_a_request


def test_the_patience_with_the_others() -> None:
    ranks = Ranks("n1", grace=60)
    times = [ranks.patience_after(ended(status)) for status in (1, 138, 75, 0)]
    assert times == sorted(times) and times[:2] == [60, 60]
    ranks.stop = signal.SIGUSR1
    assert ranks.patience_after(ended(138)) < 10


def test_the_node_of_a_step() -> None:
    assert find_node(SRUN, 8) == Node(1, 4, 8, "n1", 10123)


@pytest.mark.parametrize("name", SRUN)
def test_a_variable_that_is_missing_or_wrong(name: str) -> None:
    with pytest.raises(UserError, match=f"environment: {name} is missing: start with srun"):
        find_node({key: value for key, value in SRUN.items() if key != name}, 8)
    if name != "MASTER_ADDR":
        with pytest.raises(UserError, match=f"environment: {name} is 'x': start with srun"):
            find_node({**SRUN, name: "x"}, 8)


def test_no_processes_on_a_node() -> None:
    with pytest.raises(UserError, match="PER_NODE is 0"):
        find_node(SRUN, 0)


def test_the_limit_of_open_files_is_raised() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    program = """
import resource
from mf_train.launch.node import raise_open_files
resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
raise_open_files()
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=REPOSITORY,
        timeout=60,
    )
    soft, after = map(int, done.stdout.split())
    assert after == hard
    assert soft == (65536 if hard == resource.RLIM_INFINITY else min(65536, hard))
