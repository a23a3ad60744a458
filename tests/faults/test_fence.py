"""A run that is started again while an earlier start still lives: the later start wins and loses nothing."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import Drill, MakeRun
from tests.faults.drill import Loss, Moment, Run, Start, list_steps

AT_EVENT = Path(__file__).with_name("at_event.py")
pytestmark = [pytest.mark.faults, pytest.mark.slow]
CHANGES = {
    "a file of the checkpoint is opened": "^open .*partial",
    "the manifest is written": "^open .*manifest.json",
    "the checkpoint gets its name": r"^os.rename .*checkpoints/step-\d+$",
    "`latest` is written": r"^open .*checkpoints/\.latest",
    "`latest` is moved": "^os.rename .*checkpoints/latest$",
    "old checkpoints are deleted": r"^os.rename .*checkpoints/step-\d+ ",
}


def wake(stale: Start, run: Run) -> None:
    """Let a stopped start go on: it ends with one line that names its successor and harms nothing."""
    files = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    stale.send(signal.SIGCONT, stale.processes())
    assert stale.end() == 1, stale.text()
    (line,) = stale.complaints()
    assert "start" in line and str(run.folder) in line, line
    now = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*") if path.is_file()}
    assert now == files
    run.check_end()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", ["step", "saving"])
def test_a_start_that_was_asleep(processes: int, kind: str, make_run: MakeRun, drill: Drill) -> None:
    """All processes stop, as on a node that hangs; the run is started elsewhere and ends; then they go on."""
    drill.case("a stale start wakes up")
    run = make_run(processes, 12)
    stale = run.start()
    Moment(kind, 2, drill.random.uniform(0, 0.1)).wait(stale)
    stale.send(signal.SIGSTOP, stale.processes())
    drill.struck(run.check_folder(saving=stale.saving()))
    drill.recovered(run.finish())
    wake(stale, run)


@pytest.mark.parametrize("change", CHANGES)
def test_a_start_asleep_in_a_save(change: str, make_run: MakeRun, drill: Drill) -> None:
    """As above, stopped just before a change of files that the save makes."""
    drill.case("a stale start wakes up in its save")
    run = make_run(1, 12)
    stale = run.start(script=[str(AT_EVENT), "SIGSTOP", "1", CHANGES[change]])
    stale.wait_until(lambda: "struck before" in stale.text(), "the stop")
    drill.struck(run.check_folder(saving=True))
    drill.recovered(run.finish())
    wake(stale, run)


def test_started_twice(make_run: MakeRun, drill: Drill) -> None:
    """Both live: the first ends at its next save, and the second goes on to the end undisturbed."""
    drill.case("started twice")
    run = make_run(1, 60)
    first = run.start()
    first.wait_for_step(3)
    drill.recovered(run.finish())
    assert first.end() == 1, first.text()
    (line,) = first.complaints()
    assert "start" in line, line
    drill.struck(Loss(0, -run.interval))
    run.check_end()
    assert list_steps(run.checkpoints) == [56, 58, 60]
