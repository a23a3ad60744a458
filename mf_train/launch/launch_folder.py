"""What `memoryformer launch` keeps in a run's folder, and how far the run is by what lies there.

    launch/job.json     the newest job's number, and what was submitted
    launch/starts.tsv   a line for the beginning and one for the end of every start, written by the job's script

`python -m mf_train.launch.launch_folder CONFIG ...` prints the run's folder, for the job's script.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mf_train.checkpoint.layout import LATEST
from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.run_folder import CHECKPOINTS, CONFIG, LAUNCH, METRICS, last_metrics

JOB, SCRIPT, LOGS, STARTS = "job.json", "job.sbatch", "logs", "starts.tsv"


@dataclass(frozen=True)
class Start:
    """One start of a job, as the job's script noted it; the end's fields are empty while it runs or was cut off."""

    job: str
    number: int
    began: str  # ISO 8601
    nodes: str  # compressed list
    processes: str
    checkpoint: str  # the newest one when it began
    ended: str = ""
    status: str = ""
    next: str = ""  # what the script did then
    checkpoint_after: str = ""

    @property
    def ranks(self) -> int:
        return int(self.processes) if self.processes.isdigit() else 0


@dataclass(frozen=True)
class Progress:
    """The newest step's record and the newest checkpoint."""

    steps: int  # that are to be trained; 0 where the configuration cannot be read
    metrics: dict[str, Any]
    age: float | None  # seconds since the last step was recorded
    checkpoint: str


def recorded_jobs(folder: Path) -> list[str]:
    """Numbers of the jobs launched for a run's or an array's folder that may be alive, the newest last; [] if none."""
    record = read_record(folder)
    return [*record.get("before", []), record["job"]] if record else []


def read_record(folder: Path) -> dict[str, Any]:
    """A run's launch/job.json, or {}. Raises UserError where it cannot be read."""
    path = folder / LAUNCH / JOB
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError):
        record = None
    if not _is_record(record):
        raise UserError(f"{path}: is damaged; delete it if no job of this run is in the queue")
    return dict(record)


def _is_record(record: Any) -> bool:
    """Whether it is what `launch` writes, in all that is read of it."""
    if not isinstance(record, dict):
        return False
    before, runs = record.get("before", []), record.get("runs", {"0": ""})
    return (
        isinstance(record.get("job"), str)
        and isinstance(record.get("common", ""), str)
        and isinstance(before, list)
        and all(isinstance(number, str) for number in before)
        and isinstance(runs, dict)  # folders by the number of an array's task
        and len(runs) > 0
        and all(task.isdecimal() and isinstance(run, str) for task, run in runs.items())
    )


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a run's launch/job.json. Raises OSError."""
    write_whole(folder / LAUNCH / JOB, (json.dumps(record, indent=1) + "\n").encode())


def read_progress(run: Path) -> Progress:
    """How far a run is."""
    try:
        steps = load_config(run / LAUNCH / CONFIG).training.steps
    except UserError:
        steps = 0
    metrics = last_metrics(run)
    age = max(0.0, time.time() - (run / METRICS).stat().st_mtime) if metrics else None
    try:
        checkpoint = (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip()
    except OSError:
        checkpoint = "none"
    return Progress(steps, metrics, age, checkpoint)


def read_starts(run: Path) -> list[Start]:
    """The starts of a run's jobs, oldest first. A line that is no start's is passed over."""
    try:
        lines = (run / LAUNCH / STARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: dict[tuple[str, str], Start] = {}
    for line in lines:
        fields = line.split("\t")
        if len(fields) != 9 or not fields[2].isdigit():
            continue
        when, job, number, event, nodes, processes, checkpoint, status, following = fields
        before = found.get((job, number), Start(job, int(number), when, nodes, processes, checkpoint))
        if event == "ended":
            before = replace(before, ended=when, status=status, next=following, checkpoint_after=checkpoint)
        found[job, number] = before
    return list(found.values())


def seconds_between(first: str, last: str) -> float | None:
    """Seconds between two ISO 8601 times, None where one is none."""
    try:
        return (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()
    except (ValueError, TypeError):
        return None


if __name__ == "__main__":
    try:
        print(load_config(sys.argv[1], sys.argv[2:]).training.output_dir)
    except UserError as error:
        sys.exit(f"memoryformer: {error}")
