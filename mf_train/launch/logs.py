"""The logs of one start of a job: one file a rank, one file a node, and the lines in them that other tools read.

    LOGS/rank-00003.log   what rank 3 and its children wrote, between a head and an ending line
    LOGS/node-001.log     what the agent of node 1 did: an ending line for each of its ranks

Every process appends to a file of its own with `O_APPEND`, so that none waits for another.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

_PIECE = 2**16  # bytes copied at once
_SECONDS_BETWEEN_LOOKS = 0.2
_SAY_SECONDS = 2.0
_TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00"  # whole, or the line was cut
_ENDING = re.compile(
    r"^rank (?P<rank>\d+) on (?P<host>\S+) (?:ended with status (?P<status>\d+)|was killed by signal (?P<signal>\d+)"
    r" \(\w+\)) at (?P<time>" + _TIME + r")(?P<note>: .*)?$"
)
_HEAD = re.compile(r"^rank (?P<rank>\d+) on (?P<host>\S+) started at (?P<time>" + _TIME + r"): ")
_BY_THE_AGENT = "ended by its agent after another rank failed"


class Ending(NamedTuple):
    """How a rank's process ended: `status` 128 + n is signal n."""

    rank: int
    host: str
    status: int
    time: float  # seconds since the epoch
    by_agent: bool = False  # another rank had failed before, and the agent ended this one
    note: str = ""


def rank_log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.log"


def node_log(folder: Path, node: int) -> Path:
    return folder / f"node-{node:03d}.log"


def open_log(path: Path) -> int:
    """A descriptor that appends to the file, its folder made if need be. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


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


def format_ending(ending: Ending) -> str:
    if ending.status > 128:
        number = ending.status - 128
        how = f"was killed by signal {number} ({signal_name(number)})"
    else:
        how = f"ended with status {ending.status}"
    note = _BY_THE_AGENT if ending.by_agent else ending.note
    return f"rank {ending.rank} on {ending.host} {how} at {format_time(ending.time)}" + (
        f": {note}" if note else ""
    )


def parse_ending(line: str) -> Ending | None:
    """The ending that a line tells, None if it is another line."""
    found = _ENDING.match(line)
    seconds = None if found is None else _parse_time(found["time"])
    if found is None or seconds is None:
        return None
    status = int(found["status"]) if found["status"] else 128 + int(found["signal"])
    note = (found["note"] or "").removeprefix(": ")
    by_agent = note == _BY_THE_AGENT
    return Ending(int(found["rank"]), found["host"], status, seconds, by_agent, "" if by_agent else note)


def signal_name(number: int) -> str:
    """As in signal(7): SIGKILL for 9."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def size_of(path: Path) -> int:
    """Bytes of a file, 0 where there is none yet."""
    return path.stat().st_size if path.exists() else 0


class Copy:
    """What a file holds from an offset on, copied to a descriptor by a thread, which may be held up there."""

    def __init__(self, path: Path, to: int, offset: int) -> None:
        self._path, self._to, self._offset = path, to, offset
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="copy", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Copy the rest, giving up after so long; nothing may write to the file any more."""
        self._closing.set()
        self._thread.join(seconds)

    def _follow(self) -> None:
        try:
            while not self._closing.wait(_SECONDS_BETWEEN_LOOKS):
                self._copy()
            self._copy()
        except OSError:  # nobody reads any more; the file has it all
            pass

    def _copy(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._offset)
            while piece := file.read(_PIECE):
                self._offset += len(piece)
                write_all(self._to, piece)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it. Raises OSError."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def say(descriptor: int, line: str) -> None:
    """One line, whole, also where other processes write to the same place; dropped where that takes longer than 2 s.

    Whoever watches over ranks must not be held up by the storage that holds the logs.
    """

    def write() -> None:
        with suppress(OSError):
            write_all(descriptor, f"{line}\n".encode())

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(_SAY_SECONDS)
