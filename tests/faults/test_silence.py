"""A rank that stops answering: the run ends in bounded time and says which rank it was."""

from __future__ import annotations

import signal
import time

import pytest

from tests.faults.conftest import Drill, MakeRun
from tests.faults.drill import Moment

LIMIT = 20  # seconds; a start on a busy machine must not take so long
TORCHRUN = 35.0  # seconds that torchrun gives a process to end before it kills it, and some
pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.mark.parametrize(("rank", "kind"), [(0, "step"), (1, "step"), (1, "saving")])
def test_a_stopped_rank(rank: int, kind: str, make_run: MakeRun, drill: Drill) -> None:
    drill.case("SIGSTOP of one rank of two")
    run = make_run(2, 60, keep=0, collective_timeout_seconds=LIMIT)  # kept, so that saves can be counted
    moment = Moment(kind, drill.random.randrange(1, 6), drill.random.uniform(0, 0.1))
    start = run.start()
    moment.wait(start)
    saving = start.saving()
    stopped = time.monotonic()
    start.send(signal.SIGSTOP, [start.ranks()[rank]])
    assert start.end(LIMIT + 60 + TORCHRUN) == 1, start.text()
    took = time.monotonic() - stopped
    drill.failed(took)
    print(f"{start.errors.name}: {moment}: {start.complaints()}")
    assert took < 2 * LIMIT + TORCHRUN, start.text()
    (line,) = start.complaints()
    assert f"rank {rank} " in line, line
    drill.struck(run.check_folder(saving=saving))
    drill.recovered(run.finish())
