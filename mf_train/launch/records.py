"""What `memoryformer launch` keeps of a job in a run's folder."""

import json
from pathlib import Path
from typing import Any

from mf_train.errors import UserError
from mf_train.files import write_whole

LAUNCH, JOB, SCRIPT, CONFIG, LOGS, STARTS = (
    "launch",
    "job.json",
    "job.sbatch",
    "config.yaml",
    "logs",
    "starts.tsv",
)


def recorded_jobs(folder: Path) -> list[str]:
    """Numbers of the jobs launched for a run's or an array's folder that may be alive, the newest last; [] if none."""
    record = read_record(folder)
    return [*record.get("before", []), record["job"]] if record else []


def read_record(folder: Path) -> dict[str, Any]:
    """A run's launch/job.json, or {}. Raises UserError where it cannot be read."""
    path = folder / LAUNCH / JOB
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError:
        raise UserError(f"{path}: is damaged; delete it if no job of this run is in the queue") from None


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write a run's launch/job.json. Raises OSError."""
    write_whole(folder / LAUNCH / JOB, (json.dumps(record, indent=1) + "\n").encode())
