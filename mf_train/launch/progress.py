"""How far a launched run is, from the files in its folder alone."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.launch.records import STARTS
from mf_train.run_folder import CHECKPOINTS, CONFIG, LAUNCH, METRICS, last_metrics


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


@dataclass(frozen=True)
class Progress:
    """The newest step's record and the newest checkpoint."""

    steps: int  # that are to be trained; 0 where the configuration cannot be read
    metrics: dict[str, Any]
    age: float | None  # seconds since the last step was recorded
    checkpoint: str


def read_progress(run: Path) -> Progress:
    """How far a run is."""
    try:
        steps = load_config(run / LAUNCH / CONFIG).training.steps
    except UserError:
        steps = 0
    metrics = last_metrics(run)
    age = max(0.0, time.time() - (run / METRICS).stat().st_mtime) if metrics else None
    try:
        checkpoint = (run / CHECKPOINTS / "latest").read_text(encoding="utf-8").strip()
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


def duration(seconds: float) -> str:
    """1:02:03 or, from a day on, 2-01:02:03, as SLURM writes it."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-{hour:02}" if days else f"{hour}") + f":{minute:02}:{second:02}"
