"""Where a cell's run stands, from the files in its folder alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from mf_train.errors import UserError
from mf_train.exit_status import STOPPED
from mf_train.files import write_whole
from mf_train.launch.launch_folder import LOGS, Start, read_starts
from mf_train.launch.report import first_error
from mf_train.run_folder import LAUNCH, last_metrics
from mf_train.study.cells import Cell

OUTCOME, LOG = "outcome.json", "output.log"  # in the run's folder, of a cell that ran here
DONE, FAILED, UNFINISHED, MISSING = "done", "failed", "unfinished", "missing"


@dataclass(frozen=True)
class Outcome:
    """How a cell's process ended here."""

    status: int  # 128 + n for signal n
    reason: str  # its last line
    seconds: float


@dataclass(frozen=True)
class State:
    """done: all steps are recorded; failed: it ended with an error; unfinished: it has begun; missing: it has not."""

    name: str
    step: int
    reason: str = ""


def cell_state(cell: Cell) -> State:
    """Where a cell stands."""
    folder, steps = cell.folder, cell.config.training.steps
    step = int(last_metrics(folder).get("step", 0))
    if step >= steps:
        return State(DONE, step)
    if failure := _failure(folder):
        return State(FAILED, step, failure)
    if step or (folder / OUTCOME).exists() or read_starts(folder):
        return State(UNFINISHED, step)
    return State(MISSING, 0)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Record how a cell's process ended. Raises OSError."""
    write_whole(folder / OUTCOME, (json.dumps(asdict(outcome)) + "\n").encode())


def _failure(folder: Path) -> str:
    """Why the newest start of a cell failed, here or under SLURM; '' if it did not."""
    if starts := read_starts(folder):
        last = starts[-1]
        if last.next == "ends":  # otherwise the job goes on, or was stopped
            return _first_error(folder, last) or (
                f"job {last.job} ended with {last.status}: see memoryformer launch logs {folder}"
            )
        return ""
    path = folder / OUTCOME
    try:
        outcome = Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged; delete it, and the cell runs again") from None
    return "" if outcome.status in (0, STOPPED) else outcome.reason


def _first_error(folder: Path, start: Start) -> str:
    """What the first rank that failed said last; '' where its log has gone or says nothing."""
    logs = folder / LAUNCH / LOGS / f"{start.job}-{start.number}"
    error = first_error(logs, start.ranks) if logs.is_dir() else None
    return error.lines[-1].strip().removeprefix("memoryformer: ") if error and error.lines else ""
