"""`memoryformer launch --check`: a minute on the allocated nodes, before a run does: a table, and which stands out."""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mf_train
from mf_train.config import Config
from mf_train.errors import TrainingError, UserError
from mf_train.launch import slurm
from mf_train.launch.limits import checkpoint_bytes, notice_seconds
from mf_train.launch.options import JobOptions
from mf_train.launch.preflight import MARK
from mf_train.launch.render import JobFolders, container
from mf_train.launch.verdict import Expected, collect, judge, list_names, summary, table
from mf_train.run_folder import LAUNCH

MINUTES = 10  # of an allocation of its own
ANSWER_SECONDS = 45  # in which a node starts a program
MEASURE_SECONDS = 300  # at most; a minute is usual
LEAST_BYTES, MOST_BYTES = 16 << 20, 512 << 20  # a node's file in the run's folder
_GRANTED = re.compile(r"[Gg]ranted job allocation (\d+)")


def check(config: Config, options: JobOptions) -> int:
    """Measures the nodes and prints the table; 0 where all is well, 1 where a run would fail or a node stands out.

    Uses the job that it is called in (SLURM_JOB_ID), else gets nodes with salloc for the time of the check. Raises
    UserError where SLURM refuses that, TrainingError where nothing could be measured, OSError.
    """
    run = Path(config.training.output_dir).absolute()
    begin = time.monotonic()
    with _allocation(options) as job, _scratch(run / LAUNCH, job) as folder:
        names = _nodes(job)
        print(f"job {job}: checking {list_names(names)}", flush=True)
        answering = _answering(job, names)
        size = min(max(checkpoint_bytes(config) // max(len(answering), 1), LEAST_BYTES), MOST_BYTES)
        lines = _measure(job, options, answering, folder, run, size) if answering else []
        expected = Expected(
            processes=options.per_node,
            gpus=options.gpus_per_node or 0,
            checkpoint_bytes=checkpoint_bytes(config),
            kept=_kept(config),
            notice=notice_seconds(config, options),
        )
    nodes = collect(names, answering, lines)
    findings = judge(nodes, expected)
    print(f"{table(nodes, findings)}\n{summary(nodes, findings, expected)}")
    print(f"(checked in {time.monotonic() - begin:.0f} s)")
    return int(any(finding.fails for finding in findings))


def _kept(config: Config) -> int:
    """Checkpoints that the run's folder holds at most, with the one that is being written."""
    steps, saving = config.training.steps, config.checkpoint
    made = (max(1, steps // saving.interval) if saving.interval else 1) + len(config.phases)
    studied = steps // saving.keep_every if saving.keep_every else 0
    return min(saving.keep or made, made) + studied + 1


@contextmanager
def _allocation(options: JobOptions) -> Iterator[str]:
    """The number of the job whose nodes are checked."""
    if own := os.environ.get("SLURM_JOB_ID"):
        yield own
        return
    number = _allocate(options)
    try:
        yield number
    finally:
        with suppress(UserError):  # it has ended by itself
            slurm.cancel(number)


def _allocate(options: JobOptions) -> str:
    """Waits for nodes as the run would get them. Raises UserError with SLURM's words."""
    asked: dict[str, str | int | None] = {
        "job-name": "memoryformer-check",
        "nodes": options.node_range[1],
        "gpus-per-node": options.gpus_per_node,
        "ntasks-per-node": options.tasks_per_node,
        "cpus-per-task": options.cpus_per_task,
        "time": MINUTES,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "mem": 0 if options.exclusive else None,
    }
    command = ["salloc", "--no-shell", "--no-kill", *(["--exclusive"] if options.exclusive else [])]
    command += [f"--{key}={value}" for key, value in asked.items() if value is not None]
    try:
        process = subprocess.Popen(
            [*command, *options.sbatch], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
        )
    except FileNotFoundError:
        raise slurm.MissingError(
            "salloc: not found: SLURM is not installed on this machine; run this on a login node"
        ) from None
    number, told = None, []
    with process:
        assert process.stderr is not None
        for line in process.stderr:
            told.append(re.sub(r"^salloc: (error: )?", "", line.strip()))
            if "queued and waiting" in line:
                print(f"{told[-1]} (Ctrl-C gives up)", flush=True)
            if match := _GRANTED.search(line):
                number = match[1]
    if process.returncode or number is None:
        there = f"; partitions here: {', '.join(slurm.partitions())}"
        raise slurm.RefusedError(f"salloc: {'; '.join(told) or 'no nodes and no reason'}{there}")
    return number


@contextmanager
def _scratch(launch: Path, job: str) -> Iterator[Path]:
    """A folder in the run's launch folder, gone afterwards with what was made for it."""
    made = [path for path in (launch, launch.parent) if not path.exists()]
    folder = launch / f"check-{job}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # something else lies there by now
                path.rmdir()


def _nodes(job: str) -> list[str]:
    """The names of the job's nodes, in the order in which a step gets them."""
    found = slurm.find_jobs(job)
    if not found or not found[0].nodes:
        raise TrainingError(f"job {job} has no nodes (any more)")
    return slurm.host_names(found[0].nodes)


def _step(job: str, nodes: Sequence[str], per_node: int) -> list[str]:
    return [
        "srun",
        f"--jobid={job}",
        "--overlap",
        "--no-kill",
        "--kill-on-bad-exit=0",
        f"--nodes={len(nodes)}",
        f"--nodelist={','.join(nodes)}",
        f"--ntasks={len(nodes) * per_node}",
        f"--ntasks-per-node={per_node}",
        "--distribution=block",
    ]


def _answering(job: str, names: Sequence[str]) -> list[str]:
    """The nodes on which a program starts."""
    command = [*_step(job, names, 1), "--wait=20", "printenv", "SLURMD_NODENAME"]
    said = set(_output(command, dict(os.environ), ANSWER_SECONDS, lambda line: line in names, len(names)))
    return [name for name in names if name in said]


def _measure(
    job: str, options: JobOptions, nodes: Sequence[str], folder: Path, run: Path, size: int
) -> list[dict[str, Any]]:
    """The measurements that the nodes' processes print. Where one fails, what else they said is printed."""
    package = Path(mf_train.__file__).resolve().parents[1]
    environment = dict(os.environ) | {
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(10000 + (int(job) * 7 + 6007) % 20000),
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",  # not what lies in the working directory
    }
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    if package.name not in ("site-packages", "dist-packages"):  # else it would hide the nodes' own packages
        environment["PYTHONPATH"] = f"{package}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        if options.container:
            mounts = (*options.container_mounts, f"{package}:{package}")
            options = replace(options, container_mounts=mounts)
    prefix, srun_options = container(
        options, JobFolders(run=str(run), common=str(run), directory=os.getcwd())
    )
    gpus = [f"--gres=gpu:{options.per_node}"] if options.gpus_per_node else []
    cpus = [f"--cpus-per-task={options.cpus_per_task}"] if options.cpus_per_task else []
    program = [*prefix, options.node_python, "-m", "mf_train.launch.preflight"]
    command = [*_step(job, nodes, options.per_node), "--wait=20", *gpus, *cpus, *srun_options, *program]
    command += [str(folder), str(size), "cuda" if options.gpus_per_node else "cpu"]
    said = _output(command, environment, MEASURE_SECONDS)
    lines, other = [], []
    for line in said:
        if line.startswith(MARK):
            with suppress(ValueError):  # cut, when the process was killed
                lines.append(json.loads(line[len(MARK) :]))
        elif line.strip():
            other.append(line)
    done = {line["rank"] for line in lines if line["stage"] == "done"}
    if other and len(done) < len(nodes) * options.per_node:
        print("\n".join(["what the nodes said beside it:", *(f"  {line[:200]}" for line in other[-20:])]))
    return lines


def _output(
    command: Sequence[str], environment: dict[str, str], seconds: float, wanted: Any = None, enough: int = 0
) -> list[str]:
    """The lines that a step prints, in `seconds` at most; ends when there are `enough` wanted ones."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    end = threading.Timer(seconds, _end, [process])
    end.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if wanted is not None and sum(map(wanted, lines)) >= enough:
                break
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
    finally:
        end.cancel()
        _end(process)
    return lines


def _end(process: subprocess.Popen[str]) -> None:
    """Ends srun, which ends its step."""
    for stop in (process.terminate, process.kill):
        if process.poll() is not None:
            return
        stop()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
