"""SLURM's commands: the only file that runs sbatch, squeue, scontrol, scancel and sinfo."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from mf_train.errors import TrainingError, UserError

ACTIVE = (
    "PENDING CONFIGURING RUNNING COMPLETING SUSPENDED STOPPED REQUEUED REQUEUE_FED REQUEUE_HOLD RESIZING SIGNALING "
    "SPECIAL_EXIT STAGE_OUT"
).split()  # states of a job that has or may still get nodes
NOT_STARTED = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT")
# What a user may have set for all jobs, for sbatch to take where the job does not say otherwise. The other variables of
# this kind would change what the job relies on, such as its signal.
_DEFAULTS = tuple(
    f"SBATCH_{name}" for name in "ACCOUNT CLUSTERS CONSTRAINT PARTITION QOS RESERVATION TIMELIMIT".split()
)
_SECONDS = 60.0  # a busy controller answers late
_FIELD = re.compile(r"(?:^|\s)([A-Za-z][\w/:]*)=(\S*)")
_UNREACHABLE = re.compile(
    "contact slurm controller|Socket timed out|Connection refused|Zero Bytes were transmitted"
)
_GONE = ("Invalid job id specified", "Invalid job array")


class MissingError(UserError):
    """SLURM's commands are not on this machine."""


class RefusedError(UserError):
    """SLURM's controller did not accept what was asked, with its words."""


@dataclass(frozen=True)
class Job:
    """A job, or a task of an array, as the controller knows it."""

    number: str  # of its own, as in SLURM_JOB_ID
    state: str
    reason: str
    nodes: str  # compressed list; "" before it has some
    restarts: str
    run_time: str
    time_limit: str
    start_time: str
    end_time: str
    task: str  # of an array: its number, or several of tasks that still wait

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def tasks(self) -> set[int]:
        """The array tasks that this stands for: one, or, from 4-9%2 or 1,5-7, those that still wait."""
        found: set[int] = set()
        for part in filter(None, self.task.split("%")[0].split(",")):
            span, _, step = part.partition(":")
            first, _, last = span.partition("-")
            found.update(range(int(first), int(last or first) + 1, int(step or 1)))
        return found


@dataclass(frozen=True)
class Partition:
    """A partition as sinfo tells it."""

    name: str
    nodes: int
    time_limit: str  # as sbatch writes it, or infinite
    node_memory: float | None  # bytes of its largest node; None where SLURM was not told


def submit(script: Path, *options: str) -> int:
    """Number of the new job; what sbatch says beside it goes to standard error.

    `options` are those of the script that must win over the shell's SBATCH_ variables, which win over a script's.

    Raises RefusedError with sbatch's words, MissingError, and TrainingError where it is not known what became of it.
    """
    done = _run("sbatch", "--parsable", *options, str(script))
    if done.returncode:
        if _UNREACHABLE.search(done.stderr):
            raise TrainingError(
                f"sbatch: {_words(done.stderr)}; SLURM's controller does not answer: try again later, after a look at "
                "squeue --me"
            )
        raise RefusedError(_words(done.stderr))
    sys.stderr.write(done.stderr)
    numbers = re.findall(r"^(\d+)(?:;\S+)?$", done.stdout, re.MULTILINE)  # some sites' sbatch says more
    if not numbers:
        raise TrainingError(f"sbatch said no job's number, but {done.stdout.strip()[-200:]!r}")
    return int(numbers[-1])


def find_jobs(number: int | str) -> list[Job]:
    """A job, or the tasks of an array, that the controller still remembers; [] where it does not.

    Raises MissingError, and TrainingError where the controller does not answer.
    """
    done = _run("scontrol", "--oneliner", "show", "job", str(number))
    if done.returncode:
        if any(words in done.stderr for words in _GONE):
            return []
        raise TrainingError(f"scontrol show job {number}: {_words(done.stderr)}")
    return [_parse_job(line) for line in done.stdout.splitlines() if line.startswith("JobId=")]


def host_names(nodes: str) -> list[str]:
    """The nodes of a compressed list, in its order. Raises MissingError, TrainingError."""
    done = _run("scontrol", "show", "hostnames", nodes)
    if done.returncode:
        raise TrainingError(f"scontrol show hostnames {nodes}: {_words(done.stderr)}")
    return done.stdout.split()


def cancel(number: str) -> None:
    """End a job that waits in the queue. Raises RefusedError."""
    _cancel(number)


def signal_script(number: str, signal: str) -> None:
    """Send a signal to a running job's batch script alone. Raises RefusedError."""
    _cancel("--batch", f"--signal={signal}", number)


def partitions() -> list[str]:
    """Names of the partitions; [] where SLURM does not say."""
    done = _run("sinfo", "--noheader", "--format=%R")
    return list(dict.fromkeys(done.stdout.split()))


def find_partition(name: str | None) -> Partition | None:
    """A partition by its name (None: sbatch's default); None where there is no such one, or it has several names."""
    name = name or os.environ.get("SBATCH_PARTITION")
    done = _run("sinfo", "--noheader", "--all", "--Node", "--format=%P|%l|%m")
    rows = [line.strip().split("|") for line in done.stdout.splitlines()]
    wanted = [
        row
        for row in rows
        if len(row) == 3 and (row[0].rstrip("*") == name if name else row[0].endswith("*"))
    ]
    if not wanted:
        return None
    sizes = [int(row[2].rstrip("+")) for row in wanted if row[2].rstrip("+").isdigit()]
    largest = max(sizes, default=1)
    return Partition(
        name=wanted[0][0].rstrip("*"),
        nodes=len(wanted),
        time_limit=wanted[0][1],
        node_memory=largest * 2.0**20 if largest > 1 else None,
    )


def _cancel(*arguments: str) -> None:
    done = _run("scancel", *arguments)
    if done.returncode:
        raise RefusedError(f"scancel {' '.join(arguments)}: {_words(done.stderr)}")


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            env=_environment(),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise MissingError(
            f"{program}: not found: SLURM is not installed on this machine; run this on a login node, or render only "
            "with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise TrainingError(
            f"{program}: SLURM's controller did not answer within {_SECONDS:g} s; try again"
        ) from None


def _environment() -> dict[str, str]:
    """Without what a surrounding job or torchrun says of itself: a new job must not inherit it."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", *_DEFAULTS)
    outside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {
        name: value
        for name, value in os.environ.items()
        if name in kept or not (name.startswith(("SLURM_", "SLURMD_", "SBATCH_")) or name in outside)
    }


def _parse_job(line: str) -> Job:
    """A line of `scontrol --oneliner show job`. What the user named, which may hold spaces, stands behind these keys
    or is shadowed by them: the first of a key counts, JobName apart.
    """
    line = re.sub(r" JobName=.*? UserId=", " UserId=", line, count=1)
    fields: dict[str, str] = {}
    for key, value in _FIELD.findall(line):
        fields.setdefault(key, "" if value in ("(null)", "None", "Unknown", "N/A") else value)
    return Job(
        number=fields["JobId"],
        state=fields["JobState"].split(",")[0],
        reason=fields.get("Reason", ""),
        nodes=fields.get("NodeList", ""),
        restarts=fields.get("Restarts", "0"),
        run_time=fields.get("RunTime", ""),
        time_limit=fields.get("TimeLimit", ""),
        start_time=fields.get("StartTime", ""),
        end_time=fields.get("EndTime", ""),
        task=fields.get("ArrayTaskId", ""),
    )


def _words(text: str) -> str:
    """A command's complaint as one line, without its own name in front."""
    front = re.compile(r"^(sbatch|scancel|scontrol|sinfo): (error: )?(Batch job submission failed: )?")
    lines = [front.sub("", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines))) or "no reason given"
