"""`memoryformer launch CONFIG`: check, snapshot, render, submit, and say how to follow."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mf_train.config import Config
from mf_train.config.loading import config_to_tree
from mf_train.config.yaml_text import yaml_text
from mf_train.errors import TrainingError, UserError
from mf_train.launch import slurm
from mf_train.launch.launch_folder import JOB, LOGS, SCRIPT, recorded_jobs, write_record
from mf_train.launch.limits import checkpoint_bytes
from mf_train.launch.options import JobOptions
from mf_train.launch.plan import Plan, make_plan
from mf_train.launch.render import render_job
from mf_train.launch.snapshot import CODE, PATCH, VERSION, Changes, all_or_nothing, write_snapshot
from mf_train.run_folder import CONFIG, LAUNCH


def launch(
    config_path: str,
    overrides: Sequence[str],
    options: JobOptions,
    *,
    dry_run: bool = False,
    parsable: bool = False,
    command: Sequence[str] = (),
) -> int:
    """Submit a run, or an array of runs. Returns the exit status.

    With `dry_run` everything is written but job.json, and nothing is submitted. With `parsable` the job's number alone
    is printed. Raises UserError, also with sbatch's words where it refuses; then the run folders are as they were.
    Raises TrainingError where it is not known whether the job was taken; then what it would run stays.
    """
    plan = make_plan(config_path, overrides, options)
    for warning in plan.warnings:
        print(f"memoryformer: warning: {warning}", file=sys.stderr)
    alive = _jobs_alive(plan, options, dry_run)
    if alive:
        _check_same(plan)
    with all_or_nothing(plan.common / LAUNCH) as (changes, scratch):
        changes.make_folder(plan.common / LAUNCH / LOGS)
        if not alive:
            _put_in_place(changes, scratch, plan, options, command)
        script = plan.common / LAUNCH / SCRIPT
        changes.write(script, _script(plan, options))
        if dry_run:
            print(_dry_run_text(plan))
            return 0
        number, unclear = 0, None
        try:
            number = _submit(script, options)
        except (TrainingError, KeyboardInterrupt) as error:
            unclear = str(error) or "interrupted"
    if unclear is not None:
        raise TrainingError(
            f"{unclear}; the job may be in the queue all the same: look at squeue --me. It would run {script}"
        )
    try:
        _record(plan, options, number, alive, command)
    except OSError as error:
        raise TrainingError(f"job {number} is submitted, but {JOB} could not be written: {error}") from None
    print(number if parsable else _submitted_text(plan, options, number), flush=True)
    return 0


def _jobs_alive(plan: Plan, options: JobOptions, dry_run: bool) -> list[str]:
    """Numbers of the run's jobs that are in the queue or running, of which this one is to be a successor.

    A second job on a run's folder is refused, unless it waits with --dependency for the newest there: a chain. What a
    chain's jobs run is the folder's one snapshot, so their configuration must be the same.
    """
    folders = dict.fromkeys([plan.common, *(run.folder for run in plan.runs)])
    recorded = {folder: recorded_jobs(folder) for folder in folders}
    arrays = {number.split("_")[0]: None for numbers in recorded.values() for number in numbers}
    try:
        jobs = {number: slurm.find_jobs(number) for number in arrays}
    except slurm.MissingError:
        if dry_run:
            return []
        raise
    waits = options.dependency or ""
    found: dict[str, None] = {}
    for folder, numbers in recorded.items():
        alive = [number for number in numbers if _is_alive(number, jobs[number.split("_")[0]])]
        found |= dict.fromkeys(alive)
        newest = alive[-1].split("_")[0] if alive else ""
        if alive and (dry_run or not ("singleton" in waits or newest in re.split("[:,?]", waits))):
            raise UserError(
                f"{folder}: job {alive[-1]} of this run is still in the queue or running: stop it (memoryformer "
                f"launch stop {folder}), or let this one wait for it with --dependency afterany:{newest}"
            )
    return list(found)


def _is_alive(number: str, jobs: Sequence[slurm.Job]) -> bool:
    """Whether a job, or 12_3, task 3 of array 12, is among the active ones."""
    _, _, task = number.partition("_")
    return any(job.active and (not task or int(task) in job.tasks) for job in jobs)


def _put_in_place(
    changes: Changes, scratch: Path, plan: Plan, options: JobOptions, command: Sequence[str]
) -> None:
    write_snapshot(scratch, command)
    for name in (CODE, VERSION, PATCH):
        changes.replace(plan.common / LAUNCH / name, scratch / name)
    for run in plan.runs:
        changes.make_folder(run.folder / LAUNCH)
        changes.write(run.folder / LAUNCH / CONFIG, _config_text(run.config))


def _check_same(plan: Plan) -> None:
    for run in plan.runs:
        path = run.folder / LAUNCH / CONFIG
        if not path.is_file() or path.read_text(encoding="utf-8") != _config_text(run.config):
            raise UserError(
                f"{path}: the job before this one trains another configuration, and jobs that wait for each other on "
                "one run folder share it: launch when that one has ended, or give this one a training.output_dir of "
                "its own and checkpoint.resume"
            )


def _config_text(config: Config) -> str:
    return yaml_text(config_to_tree(config))


def _script(plan: Plan, options: JobOptions) -> str:
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    head = (
        f"Written by `memoryformer launch` at {now}. sbatch takes it again; `launch status` knows the first job only.\n"
        "It trains config.yaml in launch/ of the run's folder, with the code that lies beside this file."
    )
    return render_job(
        options,
        plan.folders,
        notice=plan.notice,
        node_counts=plan.node_counts,
        python=options.node_python,
        head=head,
    )


def _submit(script: Path, options: JobOptions) -> int:
    try:
        names = ("partition", "account", "qos", "time")
        given = [f"--{name}={value}" for name in names if (value := getattr(options, name)) is not None]
        return slurm.submit(script, *given, *options.sbatch)
    except slurm.RefusedError as error:
        there = slurm.partitions()
        remedy = "see `memoryformer launch --help` and the cluster's documentation"
        if there and "partition" in str(error).lower():
            remedy = f"the partitions there are: {', '.join(there)} (--partition)"
        raise UserError(f"sbatch refused the job: {error}; nothing was submitted; {remedy}") from None


def _record(plan: Plan, options: JobOptions, number: int, alive: list[str], command: Sequence[str]) -> None:
    shared = {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command),
        "options": asdict(options),
        "notice_seconds": plan.notice,
        "node_counts": plan.node_counts,
    }
    for run in plan.runs:
        job = str(number) if run.task is None else f"{number}_{run.task}"
        before = [old for old in alive if old in recorded_jobs(run.folder)]
        record = {"job": job, "before": before, "common": str(plan.common), **shared}
        write_record(run.folder, record)
    if options.array is not None:
        before = [old for old in alive if old in recorded_jobs(plan.common)]
        folders = {str(run.task): str(run.folder) for run in plan.runs}
        write_record(plan.common, {"job": str(number), "before": before, "runs": folders, **shared})


def _dry_run_text(plan: Plan) -> str:
    script = plan.common / LAUNCH / SCRIPT
    return f"script     {script}\nnotice     {_notice(plan)}\nsubmit by  sbatch {shlex.quote(str(script))}"


def _submitted_text(plan: Plan, options: JobOptions, number: int) -> str:
    logs = plan.common / LAUNCH / LOGS
    fewest, most = options.node_range
    nodes = str(most) if fewest == most else f"{fewest} to {most}"
    what = "GPUs" if options.gpus_per_node is not None else "tasks"
    limit = options.time or "as the partition has it"
    first = plan.runs[0].folder
    lines = [
        f"job        {number}: {nodes} nodes x {options.per_node} {what}, time {limit}",
        f"notice     {_notice(plan)}",
    ]
    if options.array is None:
        lines += [
            f"run        {plan.common}",
            f"output     {logs}/{number}.out; of every rank: {logs}/{number}-START/",
        ]
    else:
        lines += [
            f"runs       {first}, ... ({len(plan.runs)})",
            f"output     {logs}/{number}_TASK.out; of every rank: RUN/{LAUNCH}/{LOGS}/",
        ]
    lines += [f"script     {plan.common / LAUNCH / SCRIPT}"]
    lines += [f"follow     memoryformer launch logs {shlex.quote(str(first))} --follow"]
    folder = shlex.quote(str(plan.common))
    lines += [f"           memoryformer launch {verb} {folder}" for verb in ("status", "stop")]
    return "\n".join(lines)


def _notice(plan: Plan) -> str:
    size = max(checkpoint_bytes(run.config) for run in plan.runs)
    return f"{plan.notice} s before the time limit, for a checkpoint of {size / 1e9:.3g} GB (--notice)"
