"""Where a cell's run stands, from the files in its folder alone."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from mf_train.errors import UserError
from mf_train.exit_status import STOPPED
from mf_train.files import write_whole
from mf_train.launch.launch_folder import LOGS, Start, read_starts, seconds_between
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
    ended: str = ""  # ISO 8601


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
    if step or read_outcome(folder) or read_starts(folder):
        return State(UNFINISHED, step)
    return State(MISSING, 0)


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Record how a cell's process ended, now. Raises OSError."""
    noted = replace(outcome, ended=datetime.now(UTC).isoformat(timespec="seconds"))
    write_whole(folder / OUTCOME, (json.dumps(asdict(noted)) + "\n").encode())


def read_outcome(folder: Path) -> Outcome | None:
    """How a cell's newest process ended here; None where none has."""
    path = folder / OUTCOME
    try:
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise UserError(f"{path}: is damaged; delete it, and the cell runs again") from None


def _failure(folder: Path) -> str:
    """Why the newest start of a cell failed, here or under SLURM; '' if it did not."""
    outcome, starts = read_outcome(folder), read_starts(folder)
    last = starts[-1] if starts else None
    if last and outcome and (seconds_between(last.ended or last.began, outcome.ended) or 0) > 0:
        last = None
    if last:
        if last.next == "ends":  # otherwise the job goes on, or was stopped
            return _first_error(folder, last) or (
                f"job {last.job} ended with {last.status}: see memoryformer launch logs {folder}"
            )
        return ""
    return "" if outcome is None or outcome.status in (0, STOPPED) else outcome.reason


def _first_error(folder: Path, start: Start) -> str:
    """What the first rank that failed said last; '' where its log has gone or says nothing."""
    logs = folder / LAUNCH / LOGS / f"{start.job}-{start.number}"
    error = first_error(logs, start.ranks) if logs.is_dir() else None
    return error.lines[-1].strip().removeprefix("memoryformer: ") if error and error.lines else ""
