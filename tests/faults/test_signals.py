"""Storms of SIGTERM: as a cluster sends them to every process, more than once and at any moment."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.conftest import Drill, MakeRun
from tests.faults.drill import Start, random_moments

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def storm(start: Start, drill: Drill, *, launcher: bool) -> int:
    """Many signals over some seconds, each to one or all of a start's processes; returns how many."""
    sent, end = 0, time.monotonic() + drill.random.uniform(0.2, 3)
    while start.process.poll() is None and (sent < 3 or time.monotonic() < end):
        ranks = list(start.ranks().values())
        everything = (
            start.processes() if launcher else [pid for pid in start.processes() if pid != start.process.pid]
        )
        pids = drill.random.choice([ranks, everything, [drill.random.choice(ranks or [0])]])
        if 0 not in pids:
            start.send(drill.random.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]), pids)
            sent += len(pids)
        time.sleep(drill.random.uniform(0, 0.1))
    return sent


@pytest.mark.parametrize(("processes", "launcher"), [(1, False), (2, False), (2, True)])
def test_storms(processes: int, launcher: bool, make_run: MakeRun, drill: Drill) -> None:
    """Whatever was asked for in the first step or later is saved; before it, nothing is there to lose."""
    drill.case(
        f"SIGTERM storm, {processes} process{'es and torchrun' if launcher else 'es' if processes > 1 else ''}"
    )
    run = make_run(processes, 60)
    for moment in random_moments(drill.random, 4):
        start = run.start()
        moment.wait(start)
        sent = storm(start, drill, launcher=launcher)
        status = start.end(left_over=60)  # ranks that have outlived torchrun still save
        print(f"{start.errors.name}: {moment}: {sent} signals, status {status}")
        done = "done: 60 steps" in start.text()  # a quick machine may be, before the signals come
        assert (status == 0) == done and "mf_train/" not in start.errors.read_text(), start.text()
        loss = run.check_folder()
        drill.struck(loss)
        if "stopped on request" in start.text():
            assert loss.again == 0, start.text()
            if not launcher:  # torchrun tells its ranks' statuses where it gets to it
                assert status == 75 or "exitcode  : 75" in start.text(), start.text()
    drill.recovered(run.finish())
