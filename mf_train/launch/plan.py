"""What `memoryformer launch` is to submit: the runs, with their configurations and what these read, checked.

Nothing is written. A wrong path that is found here costs no time in the queue.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mf_train.config import Config
from mf_train.config.loading import config_to_tree, load_config, parse_config
from mf_train.config.phases import named, phases_of
from mf_train.errors import UserError
from mf_train.launch import slurm
from mf_train.launch.limits import check_job, left_out, memory_warnings, notice_seconds, warnings
from mf_train.launch.options import TASK, JobOptions, array_tasks, check_options, time_seconds
from mf_train.launch.render import JobFolders


@dataclass(frozen=True)
class Run:
    """A run of the job: the only one, or one of an array's tasks."""

    task: int | None
    folder: Path  # absolute
    config: Config


@dataclass(frozen=True)
class Plan:
    """A checked job, before anything is written."""

    runs: tuple[Run, ...]
    folders: JobFolders
    node_counts: list[int]
    notice: int
    warnings: list[str]

    @property
    def common(self) -> Path:
        return Path(self.folders.common)


def make_plan(config_path: str, overrides: Sequence[str], options: JobOptions) -> Plan:
    """Load and check the configuration of each run against the job. Raises UserError; writes nothing."""
    runs, pattern = load_runs(config_path, overrides, options)
    check_options(options)
    memory = _check_partition(options)
    usable, notice, found = None, 0, []
    for run in runs:
        for phase in phases_of(run.config):
            with named(phase):
                counts = check_job(phase.config, options, memory)
            usable = counts if usable is None else [count for count in usable if count in counts]
            found += memory_warnings(phase.config, options, counts[-1], memory)
        notice = max(notice, notice_seconds(run.config, options))
        found += warnings(run.config, options)
        found += _check_inputs(run.config, later=options.dependency is not None)
    assert usable is not None
    if not usable:
        raise UserError(
            "no number of nodes of --elastic works for all phases, and tasks of --array: make their degrees agree"
        )
    if out := left_out(options, usable):
        found.append(
            f"the degrees allow {', '.join(map(str, usable))} nodes: {', '.join(map(str, out))} are not used"
        )
    common = pattern.replace(TASK, "array")
    if any(str(run.folder) == common for run in runs if run.task is not None):
        raise UserError(f"training.output_dir: {common} is what the tasks share: choose another name")
    if ":" in common:
        raise UserError(
            f"training.output_dir is {pattern}: a folder in PYTHONPATH must have no ':' in its name"
        )
    folders = JobFolders(run=pattern, common=common, directory=os.getcwd())
    return Plan(tuple(runs), folders, usable, notice, list(dict.fromkeys(found)))


def _check_partition(options: JobOptions) -> float | None:
    """Memory of a node without GPUs, in bytes, where SLURM is here and knows it.

    Raises UserError for a job that its partition could never start: many clusters would let it wait for ever.
    """
    try:
        partition = slurm.find_partition(options.partition or os.environ.get("SBATCH_PARTITION"))
    except slurm.MissingError:  # a dry run, or `sbatch` will say so
        return None
    if partition is None:  # `sbatch` says what is wrong with it
        return None
    fewest, _ = options.node_range
    if fewest > partition.nodes:
        raise UserError(
            f"--nodes {fewest}: partition {partition.name} has {partition.nodes} nodes; ask for fewer, or name another "
            "partition with --partition"
        )
    # a QOS may allow more
    if options.time and not options.qos and time_seconds(options.time) > time_seconds(partition.time_limit):
        raise UserError(
            f"--time {options.time}: the limit of partition {partition.name} is {partition.time_limit}; ask for less "
            "(the job requeues itself until its steps are done), or name another partition with --partition"
        )
    return partition.node_memory if options.gpus_per_node is None else None


def load_runs(config_path: str, overrides: Sequence[str], options: JobOptions) -> tuple[list[Run], str]:
    """The runs, and their folder with TASK in it."""
    tasks: list[int | None] = [None] if options.array is None else [*array_tasks(options.array)]
    runs, pattern = [], ""
    for task in tasks:
        # the folder's own TASK is text, and replaced with the configuration's other text
        words = [
            word if task is None or word.startswith("training.output_dir=") else word.replace(TASK, str(task))
            for word in overrides
        ]
        config = load_config(config_path if task is None else config_path.replace(TASK, str(task)), words)
        before, pattern = pattern, os.path.abspath(config.training.output_dir)
        if before not in ("", pattern):
            raise UserError(
                f"training.output_dir is {pattern} for task {task} and {before} for those before: in an array it must "
                f"be the same but for {TASK}, the task's number"
            )
        if (TASK in pattern) != (task is not None):
            raise UserError(
                f"training.output_dir is {config.training.output_dir}: with --array it must contain {TASK}, the task's "
                "number, so that each task has a folder of its own; without --array it must not"
            )
        if task is not None:
            config = parse_config(_with_task(config_to_tree(config), task), f"{config_path} for task {task}")
        runs.append(Run(task, Path(os.path.abspath(config.training.output_dir)), config))
    return runs, pattern


def _with_task(tree: Any, task: int) -> Any:
    if isinstance(tree, dict):
        return {key: _with_task(value, task) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with_task(value, task) for value in tree]
    return tree.replace(TASK, str(task)) if isinstance(tree, str) else tree


def _check_inputs(config: Config, later: bool) -> list[str]:
    """Raises UserError for a tokenizer or local data that are not there, a run folder of another model, and a learning
    rate that would jump where the run goes on.

    With `later` the job waits for another one, which may make what is missing: then these are warnings, returned.
    URLs and datasets of the hub are left to the job.
    """
    from mf_train.training.folder import check_folder, find_rewarm
    from mf_train.training.resume import look_ahead

    found = []
    for check in (
        lambda: _check_tokenizer(config),
        lambda: _check_data(config),
        lambda: check_folder(config),
    ):
        try:
            check()
        except UserError as error:
            if not later:
                raise
            found.append(f"not there yet, so the job before must make it: {error}")
    if not later:
        look_ahead(config, lambda checkpoint: find_rewarm(config, checkpoint))
    return found


def _check_tokenizer(config: Config) -> None:
    if config.tokenizer.path:
        _find_tokenizer(config.tokenizer.path)


def _check_data(config: Config) -> None:
    for phase, name in product(phases_of(config), ("train", "validation")):
        for index, source in enumerate(getattr(phase.config.data, name)):
            if source.path and "://" not in source.path:
                with named(phase):
                    _find_data(source.path, f"data.{name}[{index}].path")


@cache  # the tasks of an array mostly read the same
def _find_tokenizer(path: str) -> None:
    from mf_train.data.tokenizer import find_model

    find_model(path)


@cache
def _find_data(path: str, key: str) -> None:
    from mf_train.data.files.input_files import find_files

    find_files(path, key)
