"""The logs of one start of a job, and the lines in them that other tools read.

    LOGS/rank-00003.log   what rank 3 and its children wrote, between a head and an ending line
    LOGS/node-001.log     what else was written by the start's processes on node 1: torchrun's own words (by srun)
    LOGS/stop             made by the job's script: the ranks are to save and end

Every rank appends to a file of its own with `O_APPEND`, so that none waits for another.
"""

from __future__ import annotations

import os
import re
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from mf_train.exit_status import DONE, STOPPED
from mf_train.stop_signals import BY_LAUNCHER

_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"  # whole, or the line was cut
_ENDING = re.compile(
    r"^rank (?P<rank>\d+) on (?P<host>\S+) (?:ended with status (?P<status>\d+)|was killed by signal (?P<signal>\d+)"
    r" \(\w+\)) at (?P<time>" + _TIME + r")(?:: (?P<note>.*))?$"
)
_HEAD = re.compile(r"^rank (?P<rank>\d+) on (?P<host>\S+) started at (?P<time>" + _TIME + r"): ")
_REQUEST = re.compile(r"^rank \d+ on \S+ was asked to end by \w+ at " + _TIME + "$")


class Ending(NamedTuple):
    """How a rank's process ended: `status` 128 + n is signal n."""

    rank: int
    host: str
    status: int
    time: float  # seconds since the epoch
    note: str = ""

    @property
    def on_request(self) -> bool:
        """Whether a request to stop ended it by itself: it did not listen yet, and had nothing to save."""
        return self.status - 128 in BY_LAUNCHER

    @property
    def failed(self) -> bool:
        return self.status not in (DONE, STOPPED) and not self.on_request


def rank_log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.log"


def stop_file(folder: Path) -> Path:
    return folder / "stop"


def open_log(path: Path) -> int:
    """A descriptor that appends to the file, its folder made if need be. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def format_time(seconds: float) -> str:
    """ISO 8601 in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _parse_time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:  # no such day
        return None


def format_head(rank: int, host: str, details: str) -> str:
    return f"rank {rank} on {host} started at {format_time(time.time())}: {details}"


def parse_head(line: str) -> tuple[int, str, float] | None:
    """Rank, host and time of a head line."""
    found = _HEAD.match(line)
    seconds = None if found is None else _parse_time(found["time"])
    return None if found is None or seconds is None else (int(found["rank"]), found["host"], seconds)


def format_request(rank: int, host: str, number: int) -> str:
    """The line on a signal that a rank was sent."""
    return f"rank {rank} on {host} was asked to end by {signal_name(number)} at {format_time(time.time())}"


def is_request(line: str) -> bool:
    return _REQUEST.match(line) is not None


def format_ending(ending: Ending) -> str:
    if ending.status > 128:
        number = ending.status - 128
        how = f"was killed by signal {number} ({signal_name(number)})"
    else:
        how = f"ended with status {ending.status}"
    note = f": {ending.note}" if ending.note else ""
    return f"rank {ending.rank} on {ending.host} {how} at {format_time(ending.time)}{note}"


def parse_ending(line: str) -> Ending | None:
    """The ending that a line tells, None if it is another line."""
    found = _ENDING.match(line)
    seconds = None if found is None else _parse_time(found["time"])
    if found is None or seconds is None:
        return None
    status = int(found["status"]) if found["status"] else 128 + int(found["signal"])
    return Ending(int(found["rank"]), found["host"], status, seconds, found["note"] or "")


def signal_name(number: int) -> str:
    """As in signal(7): SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
