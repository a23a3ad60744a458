"""What a run's folder holds, by name, and the reader of what it records.

config.yaml      the resolved configuration, with the versions of the packages that matter
metrics.jsonl    a JSON object for each step (docs/telemetry.md)
tensorboard/     the same numbers as event files
checkpoints/     step-000000200/ ..., and `latest`, which names the newest (checkpoint/layout.py)
profile/         what `training.profile` wrote (docs/profiling.md)
report.html      what `memoryformer report` wrote
launch/          what `memoryformer launch` keeps: job script, starts, logs
"""

import json
import os
from pathlib import Path
from typing import Any

CONFIG, METRICS, TENSORBOARD, CHECKPOINTS, PROFILE, LAUNCH = (
    "config.yaml",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "profile",
    "launch",
)
# Of a tokenizer, in its own folder and in checkpoints: one of the first two, and what lies beside it.
TOKENIZER, TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE = TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
TAIL_BYTES = 1 << 16


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, oldest first; [] where it has none yet. Raises OSError."""
    return read_records(run / METRICS)


def last_metrics(run: Path) -> dict[str, Any]:
    """The newest record of a run's metrics.jsonl; {} where it has none yet. Raises OSError."""
    return next(filter(None, map(parse_record, reversed(tail_lines(run / METRICS)))), {})


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file that may still be written, so that a line which is not whole is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [record for line in lines if (record := parse_record(line))]


def parse_record(line: str | bytes) -> dict[str, Any]:
    """The object that a line holds; {} where the line is no whole one."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def tail_lines(path: Path, size: int = TAIL_BYTES) -> list[str]:
    """The last lines of a file that lie in its last `size` bytes, the first one perhaps cut; [] if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
