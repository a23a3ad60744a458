"""kill -9, at random moments and before every change that a save makes to the file system."""

from __future__ import annotations

import itertools
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import Drill, MakeRun
from tests.faults.drill import Moment, Run, Start, random_moments

AT_EVENT = Path(__file__).with_name("at_event.py")
pytestmark = pytest.mark.faults


def kill_one(start: Start, rank: int) -> None:
    start.wait_until(lambda: rank in start.ranks(), f"rank {rank}")
    start.send(signal.SIGKILL, [start.ranks()[rank]])


def drill_kills(run: Run, drill: Drill, moments: list[Moment], *, one: bool) -> None:
    """Kill a start at each moment, one random rank or all, and let a last one come to the end."""
    for moment in moments:
        start = run.start()
        moment.wait(start)
        saving, rank = start.saving(), drill.random.randrange(run.processes)
        print(f"{start.errors.name}: {moment}{', saving' if saving else ''}: kills {rank if one else 'all'}")
        struck = time.monotonic()
        if one:
            kill_one(start, rank)
        else:
            start.kill()
        assert start.end() != 0
        drill.failed(time.monotonic() - struck)
        assert "mf_train/" not in start.errors.read_text(), start.text()  # no traceback of its own
        if start.first_step is not None:
            drill.recovered(start.first_step)
        drill.struck(run.check_folder(saving=saving))
    drill.recovered(run.finish())


@pytest.mark.slow
def test_one_rank_killed_in_a_save(make_run: MakeRun, drill: Drill) -> None:
    drill.case("kill -9 of one rank of two, in a save")
    drill_kills(make_run(2, 12), drill, [Moment("saving", 2, drill.random.uniform(0, 0.1))], one=True)


@pytest.mark.slow
@pytest.mark.parametrize("chain", range(6))
@pytest.mark.parametrize("one", [True, False], ids=["one", "all"])
def test_killed_at_random_moments(one: bool, chain: int, make_run: MakeRun, drill: Drill) -> None:
    drill.case(f"kill -9 of {'one rank of two' if one else 'all processes'}")
    drill_kills(make_run(2, 60), drill, random_moments(drill.random, 5), one=one)


@pytest.mark.slow
def test_killed_before_each_change_of_files(make_run: MakeRun, drill: Drill) -> None:
    """One start after the other is killed before the first, second, ... change that its first save makes."""
    drill.case("kill -9 before each change of files in a save")
    run = make_run(1, 60, keep=1)  # a save deletes the checkpoint before it
    for number in itertools.count(1):
        start = run.start(script=[str(AT_EVENT), "SIGKILL", str(number), ""])
        assert start.end() == -signal.SIGKILL, start.text()
        (line,) = [line for line in start.text().splitlines() if line.startswith("struck before ")]
        print(f"{start.errors.name}: {number}: {line}")
        drill.struck(run.check_folder(saving=True))
        if line.startswith("struck before os.rmdir"):
            break  # the older checkpoint is gone, which is a save's last change
    assert number > 20
    drill.recovered(run.finish())
