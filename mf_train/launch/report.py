"""How a start of a job ended, found in the logs of its ranks: `python -m mf_train.launch.report LOGS RANKS STATUS`.

The one place where this is decided. srun ends with the greatest status of its tasks and torchrun with 1 for any
failure; both hide what the ranks say. The job's script calls this after each start and goes by its exit status:

    the status of the first failure, where a rank failed; that of a rank that left no ending is STATUS, srun's, or 1
    75 where nothing but stops on request happened
    0  where every rank ended with 0

Where one rank fails, hundreds of others say that they lost it. Of all the ends that are no success and no stop on
request, the first is taken by what the log says, then by time: a rank's own error or a fatal signal; the verdict of the
watch over the run, which names a rank; a rank that left no ending at all (its node has gone); a broken connection; an
end without a word; a rank without a log. Times are those of the ending lines, by each node's clock, else of the file's
last change. Only the ends of the files are read.
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

from mf_train.errors import UserError
from mf_train.exit_status import DONE, FAILED, MISTAKE, STOPPED
from mf_train.launch.logs import (
    Ending,
    format_time,
    is_request,
    parse_ending,
    parse_head,
    rank_log,
    signal_name,
    stop_file,
)

_HEAD_BYTES, _TAIL_BYTES = 1024, 2**15
_READERS = 16  # a shared file system answers many requests at once
_ERROR_LINES = 15
_LAST_LINES = 5  # where nothing marks the error
_OURS = "memoryformer: "
_STARTS_OF_ERRORS = ("Traceback (most recent call last)", "Fatal Python error: ", "terminate called ")
_NO_ERROR = re.compile(r"memoryformer: [\d.]+ M parameters")  # the model's name: the first line of a run
_STEP = re.compile(r"step \d+/\d+ ")  # the run went on
# torchrun's own end, once a rank of its node has failed or it was asked to end: the ranks know better
_TORCHRUNS_END = re.compile(
    r"torch\.distributed\.elastic\.multiprocessing\.\w+\.(ChildFailedError|SignalException)\b"
)
_NAMES_ANOTHER = re.compile(
    r"rank \d+ on \S+ (does not answer|has ended|has been )|no sign of life|no progress for "
)
_BROKEN_CONNECTION = re.compile(
    r"torchrun's agent, at \S+ (has gone|does not answer;)|which started it, is gone"
    r"|Connection (closed|reset|refused)|Broken pipe|gloo/transport"
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
    NO_LOG = 5


class FirstError(NamedTuple):
    """The first error of a start; `rank` is None for what a node's log says."""

    rank: int | None
    host: str
    time: float  # seconds since the epoch
    how: str  # as in "ended with status 1"
    lines: list[str]
    path: Path


@dataclass(frozen=True)
class _Log:
    """The log of a rank, or of a node's other processes (rank None), as read once the start is over."""

    rank: int | None
    host: str
    time: float
    ending: Ending | None
    begun: bool  # it wrote its head line
    asked: bool  # to end, by a signal
    lines: list[str]  # the last ones, without head, requests and endings
    path: Path


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report where the start failed. Exits with its outcome, 2 also where there is no such folder."""
    words = sys.argv[1:] if arguments is None else arguments
    if len(words) != 3 or not words[1].isdigit() or not words[2].isdigit():
        print("usage: python -m mf_train.launch.report LOGS RANKS STATUS", file=sys.stderr)
        sys.exit(MISTAKE)
    try:
        status, lines = judge(Path(words[0]), int(words[1]), int(words[2]))
    except UserError as error:
        print(f"{_OURS}{error}", file=sys.stderr)
        sys.exit(MISTAKE)
    for line in lines:
        print(line)
    sys.exit(status)


def judge(folder: Path, ranks: int, starter_status: int) -> tuple[int, list[str]]:
    """The outcome of a start of so many ranks that is over, and the report's lines if it failed. Raises UserError."""
    logs = _read_logs(folder, ranks)
    first = _first(logs, folder)
    if first is None:
        saved = any(log.ending is not None and log.ending.status != DONE for log in logs)
        return STOPPED if saved else DONE, []
    if first.ending is not None:
        status = first.ending.status
    else:
        status = starter_status if starter_status not in (DONE, STOPPED) else FAILED
    return status, _report(folder, logs, first)


def first_error(folder: Path, ranks: int = 0) -> FirstError | None:
    """The first error of a start that is over, None where there is none.

    `ranks`: how many were started, to find those without a log. Raises UserError where there is no such folder.
    """
    first = _first(_read_logs(folder, ranks), folder)
    return None if first is None else _first_error(first)


def report(folder: Path, ranks: int = 0) -> list[str]:
    """The lines of the report: the first error, how the other ranks ended, where the logs are. Raises UserError."""
    logs = _read_logs(folder, ranks)
    return _report(folder, logs, _first(logs, folder))


def _report(folder: Path, logs: list[_Log], first: _Log | None) -> list[str]:
    others = [log for log in logs if log.rank is not None and log is not first]
    if first is None:
        return [f"no error in the logs of {folder}", *_table(others, None)]
    error = _first_error(first)
    name = f"a process on {error.host}" if error.rank is None else f"rank {error.rank} on {error.host}"
    return [
        f"first error: {name} {error.how} at {format_time(error.time)}",
        *(f"    {line}" for line in error.lines),
        *_table(others, error.time),
        f"  log: {error.path}" + (f" (and {len(others)} of other ranks beside it)" if others else ""),
    ]


def _first_error(log: _Log) -> FirstError:
    return FirstError(log.rank, log.host, log.time, _how(log), _error_lines(log), log.path)


def _read_logs(folder: Path, ranks: int) -> list[_Log]:
    """The logs of all ranks, and those of the nodes where a rank has none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of logs")
    # by their names as well: a shared file system may list late what other nodes made
    found = {int(path.stem[5:]) for path in folder.glob("rank-*.log") if path.stem[5:].isdecimal()}
    with ThreadPoolExecutor(_READERS) as readers:
        logs = list(readers.map(partial(_read_rank, folder), sorted(found | {*range(ranks)})))
        if not all(log.begun for log in logs):
            logs += [log for log in readers.map(_read_node, sorted(folder.glob("node-*.log"))) if log.lines]
    return logs


def _read_rank(folder: Path, rank: int) -> _Log:
    path = rank_log(folder, rank)
    head, lines, changed = _read_ends(path)
    start = parse_head(head[0]) if head else None
    endings = [ending for ending in map(parse_ending, lines) if ending is not None and ending.rank == rank]
    ending = endings[-1] if endings else None
    host = ending.host if ending is not None else start[1] if start is not None else "an unknown host"
    when = ending.time if ending is not None else changed
    return _Log(rank, host, when, ending, start is not None, any(map(is_request, lines)), _plain(lines), path)


def _read_node(path: Path) -> _Log:
    _, lines, changed = _read_ends(path)
    return _Log(None, path.stem, changed, None, True, False, _without_torchruns_end(_plain(lines)), path)


def _without_torchruns_end(lines: list[str]) -> list[str]:
    for number, line in enumerate(lines):
        if _TORCHRUNS_END.match(line):
            begins = [start for start in range(number) if lines[start].startswith(_STARTS_OF_ERRORS[0])]
            return lines[: begins[-1] if begins else number]
    return lines


def _plain(lines: list[str]) -> list[str]:
    others = (parse_ending, parse_head, is_request)
    return [line for line in lines if line.strip() and not any(other(line) for other in others)]


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


def _first(logs: list[_Log], folder: Path) -> _Log | None:
    """The log with the first error."""
    failed = [log for log in logs if log.ending is not None and log.ending.failed]
    early = any(log.ending is not None and log.ending.on_request for log in logs)
    # where a stop was asked for and a rank did not listen yet, none had begun to train: none is lost
    if failed or not (early and stop_file(folder).exists()):
        failed += [log for log in logs if log.ending is None]
    return min(failed, key=lambda log: (_weigh(log), log.time), default=None)


def _weigh(log: _Log) -> Weight:
    ending = log.ending
    if ending is not None and ending.status - 128 in _FATAL:
        return Weight.CAUSE
    lines = _marked_lines(log)
    text = "\n".join(lines)
    if log.rank is None:
        return Weight.CAUSE if lines else Weight.SILENT
    if _BROKEN_CONNECTION.search(text):
        return Weight.CONNECTION
    if lines and lines[0].startswith(_OURS) and _NAMES_ANOTHER.search(lines[0]):
        return Weight.VERDICT
    if lines:
        return Weight.CAUSE
    if ending is not None:
        return Weight.CAUSE if ending.status > 128 else Weight.SILENT
    if log.asked:
        return Weight.SILENT
    return Weight.VANISHED if log.begun else Weight.NO_LOG


def _marked_lines(log: _Log) -> list[str]:
    """From the last line that starts an error: the command's own, or a traceback; empty where there is none.

    A run does some more steps after the watch's verdict. A rank without an ending, or one that was killed, has outlived
    what stands before its last step.
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
    ending = log.ending
    if log.rank is None:
        return "failed"
    if ending is None and _weigh(log) is Weight.VERDICT:
        return "was ended by its watch over the run"
    if ending is None and not log.begun:
        return "had written nothing"
    if ending is None:
        asked = "was asked to end, " if log.asked else ""
        return f"{asked}left no ending (killed, or its node has gone), and last wrote"
    if ending.on_request:
        return f"was ended by signal {signal_name(ending.status - 128)}, as asked"
    if ending.status > 128:
        number = ending.status - 128
        return f"was killed by signal {number} ({signal_name(number)}{', ' + ending.note if ending.note else ''})"
    return f"ended with status {ending.status}"


def _table(logs: list[_Log], since: float | None) -> list[str]:
    """A line for each way in which ranks ended."""
    groups: dict[str, list[_Log]] = {}
    for log in sorted(logs, key=lambda log: log.rank or 0):
        how = "no ending: killed, or the node has gone" if log.ending is None else _how(log)
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
