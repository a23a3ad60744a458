"""The arguments of `memoryformer launch` and its verbs, and what they call."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, print_lines
from mf_train.errors import UserError
from mf_train.launch.options import JobOptions, check_options


def add_launch(commands: Any) -> None:
    """Add the commands to the command line's parser."""
    parser = add_command(
        commands,
        "launch",
        "run on a SLURM cluster: check, snapshot, render a job script, submit",
        "launch configs/base.yaml training.steps=100000 --nodes 4 --gpus-per-node 8 --time 24:00:00",
        _launch,
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a YAML file, such as configs/quickstart.yaml; may have {task} in it"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that replace the file's; {task} stands for the number of an array's task",
    )
    add_job_options(parser)
    _add_what(parser)
    parser.add_argument_group(
        "verbs", "instead of CONFIG: status RUN, stop RUN, logs RUN (each has a --help)"
    )
    _add_verbs(parser.add_verbs_beside())


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add what `options_from` reads."""
    _add_size(parser)
    _add_queue(parser)
    _add_behaviour(parser)


def options_from(given: argparse.Namespace) -> JobOptions:
    """The job that the command line asks for. Raises UserError."""
    return JobOptions(
        nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        tasks_per_node=given.tasks_per_node,
        cpus_per_task=given.cpus_per_task,
        time=given.time,
        partition=given.partition,
        account=given.account,
        qos=given.qos,
        array=given.array,
        job_name=given.job_name,
        dependency=given.dependency,
        exclusive=not given.no_exclusive,
        sbatch=tuple(given.sbatch),
        starter=given.starter,
        elastic=_range(given.elastic),
        notice=given.notice,
        retries=given.retries,
        python=given.python,
        container=given.container,
        container_mounts=tuple(given.container_mounts),
        gpu_memory=given.gpu_memory,
    )


def _add_size(parser: argparse.ArgumentParser) -> None:
    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=int, default=1, metavar="N", help="number of nodes (default: 1)")
    size.add_argument("--gpus-per-node", type=int, metavar="G", help="one process a GPU")
    size.add_argument("--tasks-per-node", type=int, metavar="T", help="processes a node without GPUs")
    size.add_argument(
        "--cpus-per-task",
        type=int,
        metavar="C",
        help="processor cores for each process (default: the node's, shared out)",
    )
    size.add_argument(
        "--elastic",
        metavar="MIN:MAX",
        help="numbers of nodes: when some fail the run continues with fewer, and the same batches",
    )
    size.add_argument(
        "--gpu-memory",
        type=float,
        default=80.0,
        metavar="GB",
        help="memory of one GPU, to refuse what cannot fit (default: 80)",
    )
    size.add_argument(
        "--no-exclusive", action="store_true", help="share nodes with other jobs; needs --cpus-per-task"
    )


def _add_queue(parser: argparse.ArgumentParser) -> None:
    queue = parser.add_argument_group("queue, as sbatch's options")
    queue.add_argument(
        "--time", metavar="T", help="time limit: minutes, H:M:S, D-H; the job requeues itself until done"
    )
    queue.add_argument("--partition", metavar="NAME", help="partition to wait in (default: the cluster's)")
    queue.add_argument("--account", metavar="NAME", help="account that the time is billed to")
    queue.add_argument("--qos", metavar="NAME", help="quality of service")
    queue.add_argument("--job-name", metavar="NAME", help="name of the job (default: the run folder's)")
    queue.add_argument("--array", metavar="TASKS", help="a run for each number: 0-2, 0-99%%10, 1,3,5")
    queue.add_argument(
        "--dependency", metavar="WHEN:JOB", help="start only after another job, such as afterok:1234"
    )
    queue.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, as --sbatch=--constraint=h100; may be repeated",
    )


def _add_behaviour(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("job")
    job.add_argument(
        "--starter",
        choices=("torchrun", "srun"),
        default="torchrun",
        help="what starts the processes (default: torchrun)",
    )
    job.add_argument(
        "--notice",
        type=int,
        metavar="SECONDS",
        help="time between the signal to save and the time limit (default: 120, and 2 for each GB of a checkpoint)",
    )
    job.add_argument(
        "--retries",
        type=int,
        default=2,
        metavar="N",
        help="restarts in a row without a new checkpoint (default: 2)",
    )
    job.add_argument(
        "--python", metavar="PATH", help="the python of the nodes (default: this one; in a container: python)"
    )
    job.add_argument(
        "--container",
        metavar="IMAGE",
        help="IMAGE.sif: Apptainer; anything else: Enroot by Pyxis' srun options",
    )
    job.add_argument(
        "--container-mounts",
        action="append",
        default=[],
        metavar="FROM:TO",
        help="mounts beside the working directory and the run's folder; may be repeated",
    )


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to do").add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="write the script, submit nothing")
    what.add_argument("--parsable", action="store_true", help="print the job's number alone")
    what.add_argument(
        "--check",
        action="store_true",
        help="train nothing: one minute of preflight on the nodes, and a verdict",
    )


def _add_verbs(verbs: Any) -> None:
    example = "launch status runs/base"
    verb = add_command(verbs, "status", "show where a run or array on the cluster stands", example, _status)
    _add_run(verb)

    example = "launch stop runs/base"
    _add_run(add_command(verbs, "stop", "have a run or array on the cluster save and end", example, _stop))

    example = "launch logs runs/base --rank 3 --follow"
    verb = add_command(
        verbs, "logs", "show the output of a run on the cluster, its first error first", example, _logs
    )
    _add_run(verb)
    verb.add_argument("--rank", type=int, metavar="N", help="one rank's own log (default: the job's output)")
    verb.add_argument(
        "--start", type=int, metavar="K", help="log of the job's K-th start (default: the newest)"
    )
    verb.add_argument("--lines", type=int, default=40, metavar="N", help="the last N lines (default: 40)")
    verb.add_argument(
        "--follow",
        action="store_true",
        help="show what is written from now on as well, until the job has ended",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_folder", type=Path, metavar="RUN", help="training.output_dir, or an array's folder"
    )


def _range(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise UserError(f"--elastic {text}: write MIN:MAX numbers of nodes, such as 2:4")
    return int(match[1]), int(match[2])


def _launch(given: argparse.Namespace) -> int:
    options = options_from(given)
    if given.check:
        from mf_train.launch.check import check
        from mf_train.launch.plan import load_runs

        check_options(options)
        runs, _ = load_runs(given.config, given.overrides, options)
        return check(runs[0].config, options)  # of an array the first task's
    from mf_train.launch.submit import launch

    return launch(
        given.config,
        given.overrides,
        options,
        dry_run=given.dry_run,
        parsable=given.parsable,
        command=["memoryformer", *sys.argv[1:]],
    )


def _status(given: argparse.Namespace) -> int:
    from mf_train.launch.control import status

    return print_lines(status(given.run_folder))


def _stop(given: argparse.Namespace) -> int:
    from mf_train.launch.control import stop

    return print_lines(stop(given.run_folder))


def _logs(given: argparse.Namespace) -> int:
    from mf_train.launch.control import logs

    return print_lines(logs(given.run_folder, given.rank, given.start, given.lines, given.follow))
