"""The job script of a run: the template's #SBATCH lines and settings, filled in. Text in, text out."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mf_train.errors import UserError
from mf_train.launch.options import TASK, JobOptions

TEMPLATE = Path(__file__).with_name("train.sbatch")
_BEGIN, _END = "# --- settings ---", "# --- end of settings ---"
_SETTING = re.compile(r"(?P<name>[a-z_]+)=.*?(?:\s+(?P<comment>#.*))?")
_TASK_NUMBER = '"$SLURM_ARRAY_TASK_ID"'


@dataclass(frozen=True, kw_only=True)
class JobFolders:
    """Where a job runs and what it belongs to. Absolute paths."""

    run: str  # the run's folder; with TASK in it for an array
    common: str  # the folder of what an array's tasks share: the run's own for a single job
    directory: str  # the working directory of the job


def render_job(
    options: JobOptions,
    folders: JobFolders,
    *,
    notice: int,
    node_counts: Sequence[int],
    python: str,
    head: str,
) -> str:
    """The text of job.sbatch. Raises UserError where a value cannot be written into it."""
    return render(
        TEMPLATE.read_text(encoding="utf-8"),
        directives(options, folders, notice),
        settings(options, folders, notice, node_counts, python),
        head,
    )


def render(template: str, lines: Sequence[str], values: Mapping[str, str], head: str) -> str:
    """The template with its #SBATCH block replaced by `lines` and the settings named in `values`, which are bash.

    `head` becomes the first comment. A setting that the template does not have is a ValueError.
    """
    before = template.splitlines()
    block = [index for index, line in enumerate(before) if line.startswith("#SBATCH ")]
    begin, end = before.index(_BEGIN), before.index(_END)
    if not block or block != list(range(block[0], block[-1] + 1)) or not block[-1] < begin < end:
        raise ValueError(f"the template needs one block of #SBATCH lines, then {_BEGIN!r} and {_END!r}")
    after = before[begin : end + 1]
    left = dict(values)
    for index, line in enumerate(after):
        match = _SETTING.fullmatch(line)
        if match and match["name"] in left:
            comment = match["comment"] or ""
            after[index] = f"{match['name']}={left.pop(match['name'])}{comment and '  ' + comment}"
    if left:
        raise ValueError(f"the template has no setting {', '.join(left)}")
    heading = [f"# {line}".rstrip() for line in head.splitlines()]
    text = [before[0], *heading, "#", *before[1 : block[0]], *lines, *before[block[-1] + 1 : begin], *after]
    return "\n".join([*text, *before[end + 1 :]]) + "\n"


def directives(options: JobOptions, folders: JobFolders, notice: int) -> list[str]:
    """The #SBATCH lines."""
    fewest, most = options.node_range
    name = "%A_%a.out" if options.array else "%j.out"
    found: list[tuple[str, str | int | None]] = [
        ("job-name", options.job_name or Path(folders.common).name),
        ("chdir", folders.directory),
        ("output", f"{_pattern(folders.common)}/launch/logs/{name}"),
        ("open-mode", "append"),
        ("nodes", str(most) if fewest == most else f"{fewest}-{most}"),
        ("gpus-per-node", options.gpus_per_node),
        ("ntasks-per-node", _tasks(options)),
        ("cpus-per-task", None if options.elastic else options.cpus_per_task),
        ("time", options.time),
        ("partition", options.partition),
        ("account", options.account),
        ("qos", options.qos),
        ("array", options.array),
        ("dependency", options.dependency),
        ("kill-on-invalid-dep", "yes" if options.dependency else None),
        ("mem", 0 if options.exclusive else None),
        ("signal", f"B:USR1@{notice}"),
    ]
    flags = ["exclusive"] if options.exclusive else []
    flags += ["requeue"]
    lines = [_directive(f"--{key}", value) for key, value in found if value is not None]
    lines += [f"#SBATCH --{flag}" for flag in flags]
    return lines + [_directive(*option.partition("=")[::2]) for option in options.sbatch]


def settings(
    options: JobOptions, folders: JobFolders, notice: int, node_counts: Sequence[int], python: str
) -> dict[str, str]:
    """The template's settings, as bash."""
    prefix, srun_options = container(options, folders)
    return {
        "run": quote(folders.run),
        "code": quote(f"{folders.common}/launch/code"),
        "python": quote(python),
        "starter": options.starter,
        "per_node": str(options.per_node),
        "cores": quote(str(options.cpus_per_task or "")),
        "node_counts": quote(" ".join(map(str, node_counts))),
        "retries": str(options.retries),
        "notice": str(notice),
        "srun_options": f"({' '.join(map(quote, srun_options))})",
        "prefix": f"({' '.join(map(quote, prefix))})",
        "arguments": '("$run/launch/config.yaml")',
    }


def container(options: JobOptions, folders: JobFolders) -> tuple[list[str], list[str]]:
    """The words before the python (Apptainer, for an image of its own format), and srun's options (Pyxis, for others).

    The working directory and the run's folders are mounted under their own names.
    Apptainer: apptainer exec --nv --bind; Pyxis: https://github.com/NVIDIA/pyxis, usage.
    """
    if options.container is None:
        return [], []
    mounted = list(dict.fromkeys([folders.directory, folders.common, folders.run]))
    for path in mounted:
        if ":" in path or "," in path:
            raise UserError(
                f"{path}: a folder that is mounted in a container must have no ':' or ',' in its name"
            )
    mounts = [*(f"{path}:{path}" for path in mounted), *options.container_mounts]
    if options.container.endswith(".sif"):
        gpus = ["--nv"] if options.gpus_per_node else []
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", *gpus, *binds, "--pwd", folders.directory, options.container], []
    return [], [
        f"--container-image={options.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={folders.directory}",
    ]


def quote(text: str) -> str:
    """One word of bash, in which nothing but TASK means anything: the array task's number."""
    return _TASK_NUMBER.join(shlex.quote(part) if part else "" for part in text.split(TASK)) or "''"


def _tasks(options: JobOptions) -> int | None:
    """Tasks are what CPUs are given to: GPU jobs that share nodes ask for them so as well.

    An elastic job asks for none, as SLURM would remember their number: requeued, it would want as many nodes again.
    """
    if options.elastic is None and (options.gpus_per_node is None or options.cpus_per_task is not None):
        return options.per_node
    return None


def _directive(option: str, value: str | int) -> str:
    """A #SBATCH line. sbatch reads quotes and backslashes in it, and nothing else."""
    text = str(value)
    if not text.isprintable():
        raise UserError(f"{option} {text!r}: sbatch cannot read this; use printable characters in one line")
    if not text:
        return f"#SBATCH {option}"
    if not re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return f"#SBATCH {option}={text}"


def _pattern(path: str) -> str:
    """A path in a file name pattern of sbatch, where % begins a field."""
    if "\\" in path:
        raise UserError(f"{path}: SLURM cannot write its output into a folder with a backslash in its name")
    return path.replace("%", "%%")
