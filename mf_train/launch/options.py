"""The options of `memoryformer launch`: what a job asks of SLURM, checked as far as no configuration is needed."""

import math
import re
import sys
from dataclasses import dataclass
from typing import Literal

from mf_train.errors import UserError

Starter = Literal["torchrun", "srun"]

TASK = "{task}"  # stands for the array task's number in overrides, in CONFIG's name and in the configuration's text
LONGEST_NOTICE = 65535  # seconds, of sbatch's --signal
_UNLIMITED = ("unlimited", "infinite")
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?"
    r"|(?P<hours>\d+):(?P<hour_minutes>\d+):(?P<hour_seconds>\d+)|(?P<minutes>\d+)(?::(?P<minute_seconds>\d+))?)"
)
_ARRAY = re.compile(r"(?P<tasks>\d+(?:-\d+(?::\d+)?)?(?:,\d+(?:-\d+(?::\d+)?)?)*)(?:%(?P<at_once>\d+))?")
_MOST_TASKS = 10_000


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """The job that `memoryformer launch` asks SLURM for. Names are those of sbatch's options where there is one."""

    nodes: int = 1  # the largest number where `elastic` is given
    gpus_per_node: int | None = None  # processes a node, one a GPU
    tasks_per_node: int | None = None  # the same for nodes without GPUs
    cpus_per_task: int | None = None
    time: str | None = None  # as sbatch reads it: minutes, H:M:S, D-H ...
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    array: str | None = None  # 0-2, 0-99%10, 1,3,5
    job_name: str | None = None
    dependency: str | None = None
    exclusive: bool = True
    sbatch: tuple[str, ...] = ()  # more options of sbatch, as they are
    starter: Starter = "torchrun"
    elastic: tuple[int, int] | None = None  # fewest and most nodes
    notice: int | None = None  # seconds between the signal and the time limit; None: by the checkpoint's size
    retries: int = 2  # restarts in a row that may pass without a new checkpoint
    python: str | None = None  # on the nodes
    container: str | None = None
    container_mounts: tuple[str, ...] = ()  # FROM:TO
    gpu_memory: float = 80.0  # GB of one GPU

    @property
    def per_node(self) -> int:
        """Processes a node."""
        return self.gpus_per_node or self.tasks_per_node or 1

    @property
    def node_python(self) -> str:
        """The python of the nodes: in a container the first one there, not this machine's."""
        return self.python or ("python" if self.container else sys.executable)

    @property
    def node_range(self) -> tuple[int, int]:
        """Fewest and most nodes."""
        return self.elastic or (self.nodes, self.nodes)


def check_options(options: JobOptions) -> None:
    """Raises UserError where an option has a value that sbatch or the job script cannot use."""
    if options.gpus_per_node is None and options.tasks_per_node is None:
        raise UserError("give --gpus-per-node G, or for nodes without GPUs --tasks-per-node T")
    if options.gpus_per_node is not None and options.tasks_per_node is not None:
        raise UserError(
            "give --gpus-per-node or --tasks-per-node, not both: a process a GPU, or a process a task"
        )
    for name in ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "notice", "gpu_memory"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    if options.retries < 0:
        raise UserError(f"--retries is {options.retries}: it must be 0 or more")
    if options.notice is not None and options.notice > LONGEST_NOTICE:
        raise UserError(f"--notice is {options.notice}: SLURM takes at most {LONGEST_NOTICE} s")
    if options.elastic is not None:
        fewest, most = options.elastic
        if not 1 <= fewest <= most:
            raise UserError(f"--elastic {fewest}:{most}: write MIN:MAX numbers of nodes, such as 2:4")
        if options.nodes not in (1, most):
            raise UserError(
                f"--nodes {options.nodes} and --elastic {fewest}:{most}: leave --nodes out, or give {most}"
            )
    if options.time is not None:
        time_seconds(options.time)
    if options.array is not None:
        array_tasks(options.array)
    if not options.exclusive and options.elastic is not None:
        raise UserError(
            "--no-exclusive and --elastic: an elastic job takes whole nodes; leave one of them out"
        )
    if not options.exclusive and options.cpus_per_task is None:
        raise UserError("--no-exclusive: say with --cpus-per-task how many CPUs each process gets")
    _check_text(options)


def _check_text(options: JobOptions) -> None:
    names = ("time", "partition", "account", "qos", "job_name", "dependency", "python", "container")
    values = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    several = [("--sbatch", value) for value in options.sbatch]
    several += [("--container-mounts", value) for value in options.container_mounts]
    for name, value in [*values.items(), *several]:
        if value is not None and (not value.strip() or not value.isprintable()):
            raise UserError(f"{name} is {value!r}: it must be one line of text")
    for value in options.sbatch:
        if not value.startswith("-"):
            raise UserError(
                f"--sbatch {value}: write the option as sbatch reads it, --sbatch=--constraint=h100"
            )
    for value in options.container_mounts:
        if ":" not in value or options.container is None:
            raise UserError(f"--container-mounts {value}: write FROM:TO, and give --container")


def time_seconds(text: str) -> float:
    """Seconds of a time limit as sbatch reads it (sbatch(1), --time). Raises UserError."""
    if text.lower() in _UNLIMITED:
        return math.inf
    match = _TIME.fullmatch(text)
    if match is None:
        raise UserError(
            f"--time {text}: write minutes, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS, DAYS-HOURS:MINUTES or "
            "DAYS-HOURS:MINUTES:SECONDS"
        )
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    hours = part["days"] * 24 + part["day_hours"] + part["hours"]
    minutes = part["day_minutes"] + part["hour_minutes"] + part["minutes"]
    seconds = (
        hours * 3600 + minutes * 60 + part["day_seconds"] + part["hour_seconds"] + part["minute_seconds"]
    )
    return seconds or math.inf  # 0 asks for no limit


def array_tasks(text: str) -> list[int]:
    """The task numbers of --array: 0-2, 1,3,5-7, 0-10:2, each with %AT_ONCE behind. Raises UserError."""
    match = _ARRAY.fullmatch(text)
    if match is None or match["at_once"] == "0":
        raise UserError(f"--array {text}: write tasks such as 0-2, 1,3,5, 0-10:2 or, two at a time, 0-9%2")
    tasks: set[int] = set()
    for part in match["tasks"].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        if (last and int(last) < int(first)) or (step and int(step) < 1):
            raise UserError(f"--array {text}: {part} is no range")
        if int(last or first) - int(first) > _MOST_TASKS * int(step or 1):
            raise UserError(f"--array {text}: more than {_MOST_TASKS} tasks")
        tasks.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return sorted(tasks)
