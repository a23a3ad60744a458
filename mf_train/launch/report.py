"""The first error of a start, found in the logs of its ranks: `python -m mf_train.launch.report LOGS`.

Where one rank fails, hundreds of others say that they lost it. Of all the ends that are no success and no stop on
request, the first is taken by what the log says, then by time: a rank's own error or a fatal signal; the verdict of the
watch over the run, which names a rank; a rank that left no ending at all (its node has gone); a broken connection; an
end without a word. Times are those of the ending lines, by each node's clock, else of the file's last change. Only the
ends of the files are read.
"""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from mf_train.errors import UserError
from mf_train.launch.logs import Ending, format_time, parse_ending, parse_head, signal_name
from mf_train.launch.node import DONE, STOPPED

_HEAD_BYTES, _TAIL_BYTES = 1024, 2**15
_READERS = 16  # a shared file system answers many requests at once
_ERROR_LINES = 15
_LAST_LINES = 5  # where nothing marks the error
_OURS = "memoryformer: "
_STARTS_OF_ERRORS = ("Traceback (most recent call last)", "Fatal Python error: ", "terminate called ")
_NO_ERROR = re.compile(r"memoryformer: [\d.]+ M parameters")  # the model's name: the first line of a run
_STEP = re.compile(r"step \d+/\d+ ")  # the run went on
_NAMES_ANOTHER = re.compile(
    r"rank \d+ on \S+ (does not answer|has ended|has been )|no sign of life|no progress for "
)
_BROKEN_CONNECTION = re.compile(
    r"torchrun's agent, at \S+ (has gone|does not answer;)|Connection (closed|reset|refused)|Broken pipe|gloo/transport"
    r"|ncclRemoteError|remote process exited|Watchdog caught collective|DistNetworkError|recvValue failed"
    r"|Socket Timeout"
)
_FATAL = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


class Weight(IntEnum):
    """How much an end tells of the cause; the least comes first."""

    CAUSE = 0
    VERDICT = 1
    VANISHED = 2
    CONNECTION = 3
    SILENT = 4


class FirstError(NamedTuple):
    """The first error of a start; `rank` is None for an agent's own."""

    rank: int | None
    host: str
    time: float  # seconds since the epoch
    how: str  # as in "ended with status 1"
    lines: list[str]
    path: Path


@dataclass(frozen=True)
class _Log:
    """What is known of a rank, or of an agent (rank None)."""

    rank: int | None
    host: str
    time: float
    ending: Ending | None
    lines: list[str]  # the last ones, without head and endings
    path: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report. Exits with 0, or with 2 where there is no such folder."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 1:
        print("usage: python -m mf_train.launch.report LOGS", file=sys.stderr)
        sys.exit(2)
    try:
        for line in report(Path(words[0])):
            print(line)
    except UserError as error:
        print(f"{_OURS}{error}", file=sys.stderr)
        sys.exit(2)


def first_error(folder: Path) -> FirstError | None:
    """The first error in a start's logs, None where there is none. Raises UserError where there is no such folder."""
    return _first(_read_logs(folder))


def report(folder: Path) -> list[str]:
    """The lines of the report: the first error, how the other ranks ended, where the logs are. Raises UserError."""
    logs = _read_logs(folder)
    error = _first(logs)
    others = [log for log in logs if log.rank is not None and (error is None or log.rank != error.rank)]
    if error is None:
        return [f"no error in the logs of {folder}", *_table(others, None)]
    name = f"an agent on {error.host}" if error.rank is None else f"rank {error.rank} on {error.host}"
    return [
        f"first error: {name} {error.how} at {format_time(error.time)}",
        *(f"    {line}" for line in error.lines),
        *_table(others, error.time),
        f"  log: {error.path}" + (f" (and {len(others)} of other ranks beside it)" if others else ""),
    ]


def _read_logs(folder: Path) -> list[_Log]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of logs")
    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(_READERS) as readers:
        agents = list(readers.map(_read_agent, [path for path in paths if path.name.startswith("node-")]))
        seen = {ending.rank: (ending, log) for log, endings in agents for ending in endings}
        ranks = list(readers.map(_read_rank, [path for path in paths if path.name.startswith("rank-")]))
    logs = [_join(log, seen) for log in ranks]
    known = {log.rank for log in logs}
    # a rank that could not even open its log wrote to its agent's
    logs += [
        _Log(ending.rank, ending.host, ending.time, ending, log.lines, log.path)
        for rank, (ending, log) in seen.items()
        if rank not in known
    ]
    return logs + [log for log, endings in agents if not endings and log.lines]


def _join(log: _Log, seen: dict[int, tuple[Ending, _Log]]) -> _Log:
    """The rank's own ending has the better time; its agent's is there whatever ended the rank."""
    if log.ending is not None or log.rank not in seen:
        return log
    ending = seen[log.rank][0]
    return _Log(log.rank, ending.host, ending.time, ending, log.lines, log.path)


def _read_rank(path: Path) -> _Log:
    head, lines, changed = _read_ends(path)
    digits = path.stem.removeprefix("rank-")
    rank = int(digits) if digits.isdecimal() else None
    start = parse_head(head[0]) if head else None
    endings = [ending for ending in map(parse_ending, lines) if ending is not None and ending.rank == rank]
    ending = endings[-1] if endings else None
    host = ending.host if ending is not None else start[1] if start is not None else "an unknown host"
    return _Log(rank, host, ending.time if ending else changed, ending, _plain(lines), path)


def _read_agent(path: Path) -> tuple[_Log, list[Ending]]:
    _, lines, changed = _read_ends(path)
    endings = [ending for ending in map(parse_ending, lines) if ending is not None]
    host = endings[0].host if endings else path.stem
    return _Log(None, host, changed, None, _plain(lines), path), endings


def _plain(lines: list[str]) -> list[str]:
    return [
        line for line in lines if line.strip() and parse_ending(line) is None and parse_head(line) is None
    ]


def _read_ends(path: Path) -> tuple[list[str], list[str], float]:
    """The first and the last lines of a file, and when it was last changed; nothing of one that cannot be read."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            tail = file.read(_TAIL_BYTES)
            changed = path.stat().st_mtime
    except OSError:
        return [], [], time.time()
    # a live line of progress ends with a carriage return: its last state is what counts
    lines = tail.decode(errors="replace").replace("\r\n", "\n").split("\n")
    return head.decode(errors="replace").splitlines(), [line.rpartition("\r")[2] for line in lines], changed


def _first(logs: list[_Log]) -> FirstError | None:
    failed = [log for log in logs if _failed(log)]
    if failed:  # else the ranks without an ending are still at work
        failed += [log for log in logs if log.rank is not None and log.ending is None and log not in failed]
    if not failed:
        return None
    first = min(failed, key=lambda log: (_weigh(log), log.time))
    return FirstError(first.rank, first.host, first.time, _how(first), _error_lines(first), first.path)


def _failed(log: _Log) -> bool:
    if log.ending is None:  # also a rank that the watch ended under srun, which leaves none
        return bool(_marked_lines(log))
    return log.ending.status not in (DONE, STOPPED)


def _weigh(log: _Log) -> Weight:
    ending = log.ending
    if ending is not None and ending.by_agent:
        return Weight.SILENT
    if ending is not None and ending.status - 128 in _FATAL:
        return Weight.CAUSE
    lines = _marked_lines(log)
    text = "\n".join(lines)
    if _BROKEN_CONNECTION.search(text):
        return Weight.CONNECTION
    if lines and lines[0].startswith(_OURS) and _NAMES_ANOTHER.search(lines[0]):
        return Weight.VERDICT
    if lines:
        return Weight.CAUSE
    if ending is None:
        return Weight.VANISHED
    return Weight.CAUSE if ending.status > 128 else Weight.SILENT


def _marked_lines(log: _Log) -> list[str]:
    """From the last line that starts an error: the command's own, or a traceback; empty where there is none.

    A run goes on for some steps after the watch's verdict. A rank that has not ended, or was killed, has outlived what
    stands before its last step.
    """
    ending = log.ending
    outlived = log.rank is not None and (ending is None or ending.status - 128 in _FATAL)
    end = len(log.lines)
    for start in range(len(log.lines) - 1, -1, -1):
        line = log.lines[start]
        if _STEP.match(line):
            end = start
            if outlived:
                break
        elif line.startswith((_OURS, *_STARTS_OF_ERRORS)) and not _NO_ERROR.match(line):
            return log.lines[start:end]
    return []


def _error_lines(log: _Log) -> list[str]:
    """At most 15 lines; of a longer traceback the first and the last ones."""
    marked = _marked_lines(log)
    if not marked:
        return log.lines[-_LAST_LINES:]
    if len(marked) <= _ERROR_LINES:
        return marked
    if marked[0].startswith(_OURS):
        return marked[:_ERROR_LINES]
    return [marked[0], "  ...", *marked[2 - _ERROR_LINES :]]


def _how(log: _Log) -> str:
    if log.rank is None:
        return "failed"
    ending = log.ending
    if ending is None and _weigh(log) is Weight.VERDICT:
        return "was ended by its watch over the run"
    if ending is None:
        return "left no ending (killed, or its node has gone), and last wrote"
    if ending.by_agent:
        return "was ended by the agent"
    if ending.status > 128:
        number = ending.status - 128
        return f"was killed by signal {number} ({signal_name(number)}{', ' + ending.note if ending.note else ''})"
    return f"ended with status {ending.status}"


def _table(logs: list[_Log], since: float | None) -> list[str]:
    """A line for each way in which ranks ended."""
    groups: dict[str, list[_Log]] = {}
    for log in sorted(logs, key=lambda log: log.rank or 0):
        how = "no ending: at work, killed, or the node has gone" if log.ending is None else _how(log)
        groups.setdefault(how.removeprefix("was "), []).append(log)
    return [f"  {_ranges(group)}: {how}{_later(group, since)}" for how, group in groups.items()]


def _ranges(logs: list[_Log]) -> str:
    """As in "ranks 0-1, 4-7"."""
    ranges: list[list[int]] = []
    for log in logs:
        rank = log.rank or 0
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    names = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)
    return f"rank{'s' if len(logs) > 1 else ''} {names}"


def _later(logs: list[_Log], since: float | None) -> str:
    if since is None or any(log.ending is None for log in logs):
        return ""
    first, last = (round(bound(log.time for log in logs) - since) for bound in (min, max))
    if first == last:
        return f", {_distance(first)}"
    return f", {first} to {_distance(last)}" if first >= 0 else f", {_distance(first)} to {_distance(last)}"


def _distance(seconds: int) -> str:
    return f"{seconds} s later" if seconds >= 0 else f"{-seconds} s before"


if __name__ == "__main__":
    main()
