"""`memoryformer launch status`, `stop` and `logs`: where a launched run stands, how to end it, what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mf_train.errors import UserError
from mf_train.exit_status import DONE, STOPPED
from mf_train.launch import slurm
from mf_train.launch.launch_folder import (
    LOGS,
    Progress,
    Start,
    read_progress,
    read_record,
    read_starts,
    seconds_between,
)
from mf_train.launch.logs import rank_log
from mf_train.launch.report import first_error, report
from mf_train.run_folder import LAUNCH, tail_lines
from mf_train.text import duration

_SHOWN_STARTS = 10
_STOP_SECONDS = 30.0  # in which a job that is leaving its nodes settles
_LOOK_SECONDS = 0.5  # between looks for new output
_ASK_SECONDS = 10.0  # between questions whether the job has ended
_LAST_ASK_SECONDS = 2.0  # the same after a start's end
_TAIL_BYTES = 1 << 20
_FINE = (str(DONE), str(STOPPED))


def status(folder: Path) -> Iterator[str]:
    """Lines on a run: its job, step, loss, speed, newest checkpoint and starts; on an array, one line a task.

    Raises UserError where nothing was launched there. What SLURM has forgotten is told from the run's files.
    """
    folder, record = _find(folder)
    if "runs" in record:
        yield from _array_status(folder, record)
        return
    yield f"run         {folder}"
    for number in [*record.get("before", []), record["job"]]:
        for line in _job_lines(number):
            yield f"job         {line}"
    progress = read_progress(folder)
    yield f"step        {_step(progress)}"
    yield f"checkpoint  {progress.checkpoint}"
    starts = read_starts(folder)
    if len(starts) > _SHOWN_STARTS:
        yield f"starts      {len(starts)}, the last {_SHOWN_STARTS}:"
    for start in starts[-_SHOWN_STARTS:]:
        yield f"start       {_start_line(start)}"
    yield from _error_line(folder)
    yield f"logs        {_output(record, folder)}"


def stop(folder: Path) -> Iterator[str]:
    """Have the run's jobs save and end, and those of an array; jobs that wait in the queue are cancelled.

    Yields a line for each job. Raises UserError where nothing was launched there.
    """
    folder, record = _find(folder)
    runs = {int(task): Path(run) for task, run in record.get("runs", {}).items()}
    numbers = [*record.get("before", []), record["job"]]
    found = False
    for number in reversed(numbers):  # first those that would start when the others end
        for job in slurm.find_jobs(number):
            if not job.active:
                continue
            found = True
            name = _name(number, job)
            where = runs.get(int(job.task), folder) if job.task.isdigit() else folder
            yield f"job {name}: {_stop_job(job, name, where)}"
    if not found:
        yield f"no job of {folder} is in the queue or running"


def logs(folder: Path, rank: int | None, start: int | None, lines: int, follow: bool) -> Iterator[str]:
    """The first error of the run's last failed start, then the last lines of the job's output or of a rank's log.

    With `follow`, what is written afterwards as well, until the job has ended. Raises UserError where there is no log.
    """
    folder, record = _find(folder)
    if "runs" in record:
        raise UserError(
            f"{folder}: is shared by the tasks of an array: name one of their folders, such as "
            f"{next(iter(record['runs'].values()))}"
        )
    if start is not None and rank is None:
        raise UserError("--start: name a rank as well with --rank; the job's output has all starts")
    yield from _first_error(folder, start)
    path = _log_path(folder, record, rank, start)
    if not path.exists() and not follow:
        raise UserError(f"{path}: there is no such log yet; see `memoryformer launch status {folder}`")
    yield f"==> {path} <=="
    shown = tail_lines(path, _TAIL_BYTES)
    yield from shown[-lines:] if lines > 0 else []
    if follow:
        yield from _follow(folder, record, rank, start, path)


def _find(folder: Path) -> tuple[Path, dict[str, Any]]:
    folder = folder.absolute()
    if folder.name == LAUNCH and not (folder / LAUNCH).exists():
        folder = folder.parent
    record = read_record(folder)
    if not record:
        what = "no such folder" if not folder.exists() else "no job was launched for this folder"
        raise UserError(
            f"{folder}: {what}: give the training.output_dir of a run that `memoryformer launch` submitted"
        )
    return folder, record


def _array_status(folder: Path, record: dict[str, Any]) -> Iterator[str]:
    yield f"array       {record['job']} ({len(record['runs'])} tasks), {folder}"
    jobs: dict[int, slurm.Job] = {}
    known = _ask(record["job"])
    for job in known or []:
        for task in job.tasks:
            jobs[task] = job
    for task, run in record["runs"].items():
        its = jobs.get(int(task))
        if its is not None:
            state = its.state
        else:
            state = "SLURM is not here" if known is None else "not known to SLURM any more"
        starts = read_starts(Path(run))
        if not (its and its.active) and starts and starts[-1].next:
            state += f" ({starts[-1].next})"
        progress = read_progress(Path(run))
        yield f"task {task:<6} {state}: step {_step(progress)}, checkpoint {progress.checkpoint}"


def _name(number: str, job: slurm.Job) -> str:
    """The name by which scancel knows a job that was found under a number: a task, several that wait, or the job."""
    if "_" in number or not job.task:
        return number
    return f"{number}_{job.task}" if job.task.isdigit() else f"{number}_[{job.task.split('%')[0]}]"


def _ask(number: str) -> list[slurm.Job] | None:
    """A job's or an array's records; None where SLURM is not on this machine."""
    try:
        return slurm.find_jobs(number)
    except slurm.MissingError:
        return None


def _job_lines(number: str) -> Iterator[str]:
    jobs = _ask(number)
    if jobs is None:
        yield f"{number}: SLURM is not installed on this machine; what follows is from the run's files"
    elif not jobs:
        yield f"{number}: SLURM does not remember it any more; what follows is from the run's files"
    for job in jobs or []:
        yield f"{number}: {_job_text(job)}"


def _job_text(job: slurm.Job) -> str:
    words = [job.state]
    if job.state in slurm.NOT_STARTED:
        words.append(f"({job.reason or 'no reason given'})")
        if job.start_time:
            words.append(f"expected to start at {job.start_time}")
    elif job.reason:
        words.append(f"({job.reason})")
    if job.nodes:
        words.append(f"on {job.nodes}, for {job.run_time} of {job.time_limit}")
    if job.state == "RUNNING" and (left := seconds_between(time.strftime("%Y-%m-%dT%H:%M:%S"), job.end_time)):
        words.append(f"({duration(max(left, 0))} left)")
    restarts = int(job.restarts)
    return " ".join(words) + (f", requeued {restarts} time{'s' if restarts > 1 else ''}" if restarts else "")


def _step(progress: Progress) -> str:
    if not progress.metrics:
        return f"none of {progress.steps}"
    step, loss = progress.metrics.get("step", 0), progress.metrics.get("loss")
    shown = "-" if loss is None else f"{loss:.4f}"  # a skipped step may have none
    speed = progress.metrics.get("tokens_per_second", float("nan"))
    assert progress.age is not None
    return f"{step} of {progress.steps}, loss {shown}, {speed:,.0f} tokens/s, recorded {duration(progress.age)} ago"


def _start_line(start: Start) -> str:
    line = f"{start.job}-{start.number} at {start.began}, {start.processes} processes on {start.nodes}"
    line += f", from {start.checkpoint}"
    if not start.ended:
        return f"{line}: no end noted"
    lasted = seconds_between(start.began, start.ended)
    after = f" after {duration(lasted)}" if lasted is not None else ""
    return f"{line}: ended{after} with status {start.status}, newest {start.checkpoint_after}: {start.next}"


def _stop_job(job: slurm.Job, name: str, run: Path) -> str:
    if job.state in slurm.NOT_STARTED:
        slurm.cancel(name)
        return "was waiting in the queue, and is cancelled"
    # the script looks for this file before it would requeue
    (run / LAUNCH / f"stop-{job.number}").touch()
    deadline = time.monotonic() + _STOP_SECONDS
    while True:
        now = next(iter(slurm.find_jobs(name)), None)
        if now is None or not now.active:
            return "has ended"
        if now.state in slurm.NOT_STARTED or now.state == "CONFIGURING":
            slurm.cancel(name)
            return "was going back into the queue, and is cancelled"
        if now.state == "RUNNING":
            slurm.signal_script(name, "USR1")
            return f"will save and end; follow with `memoryformer launch status {run}`"
        if time.monotonic() > deadline:
            return f"is {now.state}: will end when it leaves that state"
        time.sleep(_LOOK_SECONDS)


def _first_error(folder: Path, start: int | None) -> Iterator[str]:
    """The report on the last start that ended, or on the one with this number, if it failed."""
    failed = _failed_start(read_starts(folder), start)
    if failed is None:
        return
    yield f"start {failed.number} of job {failed.job} ended with status {failed.status}: {failed.next}"
    if (place := _logs_of(folder, failed)).is_dir():
        yield from report(place, failed.ranks)
    yield ""


def _error_line(folder: Path) -> Iterator[str]:
    """The first error of the last start in one line, if that failed."""
    failed = _failed_start(read_starts(folder), None)
    if failed is not None and (place := _logs_of(folder, failed)).is_dir():
        if (error := first_error(place, failed.ranks)) is not None:
            who = "a process" if error.rank is None else f"rank {error.rank}"
            last = error.lines[-1].strip() if error.lines else "no word"
            yield f"error       {who} on {error.host} {error.how}: {last}"


def _failed_start(starts: Sequence[Start], number: int | None) -> Start | None:
    ended = [start for start in starts if start.ended and number in (None, start.number)]
    return ended[-1] if ended and ended[-1].status not in _FINE else None


def _logs_of(folder: Path, start: Start) -> Path:
    return folder / LAUNCH / LOGS / f"{start.job}-{start.number}"


def _output(record: dict[str, Any], folder: Path) -> Path:
    """The output of the newest of the run's jobs that has written any, else where the newest will write."""
    place = Path(record.get("common", str(folder))) / LAUNCH / LOGS
    earlier = dict.fromkeys(start.job for start in reversed(read_starts(folder)))
    paths = [
        place / f"{number}.out" for number in [record["job"], *reversed(record.get("before", [])), *earlier]
    ]
    return next((path for path in paths if path.exists()), paths[0])


def _log_path(folder: Path, record: dict[str, Any], rank: int | None, start: int | None) -> Path:
    """Where a rank's log, or the job's output, is or will be. Raises UserError for a start that never was."""
    if rank is None:
        return _output(record, folder)
    starts = read_starts(folder)
    if start is not None:
        starts = [known for known in starts if known.number == start]
    if not starts:
        which = "it has not started yet" if start is None else f"there is no start {start}"
        raise UserError(f"{folder}: {which}; see `memoryformer launch status {folder}`")
    return rank_log(_logs_of(folder, starts[-1]), rank)


def _follow(
    folder: Path, record: dict[str, Any], rank: int | None, start: int | None, path: Path
) -> Iterator[str]:
    """New lines of the log; a later start's log after it. Ends when the job has."""
    offset, asked, over = path.stat().st_size if path.exists() else 0, time.monotonic(), False
    patience = _ASK_SECONDS
    while True:
        lines, offset = _new_lines(path, offset, everything=over)
        yield from lines
        if over:
            return
        newest = _log_path(folder, record, rank, start)
        if newest != path and not lines:
            path, offset = newest, 0
            yield f"==> {path} <=="
        elif time.monotonic() - asked > patience:
            over, asked = not _any_active(record), time.monotonic()
            starts = read_starts(folder)
            patience = _LAST_ASK_SECONDS if starts and starts[-1].ended else _ASK_SECONDS
        if not lines:
            time.sleep(_LOOK_SECONDS)


def _new_lines(path: Path, offset: int, everything: bool) -> tuple[list[str], int]:
    """Whole lines from a byte offset on, and the offset behind them; with `everything` also one that is not ended."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(_TAIL_BYTES)
    except FileNotFoundError:
        return [], offset
    whole = data if everything or len(data) == _TAIL_BYTES else data[: data.rfind(b"\n") + 1]
    return whole.decode(errors="replace").splitlines(), offset + len(whole)


def _any_active(record: dict[str, Any]) -> bool:
    numbers: Sequence[str] = [*record.get("before", []), record["job"]]
    return any(job.active for number in numbers for job in _ask(number) or [])
