"""One training run, from its configuration to its last checkpoint: set-up, and one phase after the other."""

import gc
import logging
import os
from functools import partial
from pathlib import Path

import torch

from mf_train import kernels
from mf_train.checkpoint.fence import Fence
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config
from mf_train.config.phases import named, phases_of
from mf_train.errors import UserError
from mf_train.exit_status import DONE, STOPPED
from mf_train.kernels.build import UnsupportedError
from mf_train.parallel.agreement import run_on_all, run_on_first
from mf_train.parallel.degrees import Degrees, check_degrees
from mf_train.parallel.groups import Groups, start_processes, stop_processes
from mf_train.parallel.processes import Process
from mf_train.parallel.watch import Watch
from mf_train.training.binding import bind_cores
from mf_train.training.device import (
    check_host_memory,
    find_device,
    keep_freed_memory,
    limit_threads,
    make_deterministic,
)
from mf_train.training.environment import set_kernel_cache
from mf_train.training.evaluate import open_tasks
from mf_train.training.folder import check_folder
from mf_train.training.inputs import PhaseInputs, open_phases
from mf_train.training.loop import PhaseRun, Shared, read_state
from mf_train.training.metrics import Records
from mf_train.training.resume import choose_checkpoint, look_ahead
from mf_train.training.stopping import StopRequest
from mf_train.training.wandb_run import check_wandb

_WATCH_SPEAKS_FIRST_SECONDS = 60  # before a collective's own timeout, which names no rank


def train(config: Config, process: Process) -> int:
    """Train on this process and its peers until `training.steps` or a stop signal; returns the exit status.

    Raises UserError, TrainingError or OSError on rank 0 for the first rank that failed, and PeerError on the others.
    """
    stop = StopRequest().install(speak=process.rank == 0)
    for phase in phases_of(config):
        with named(phase):
            check_degrees(phase.config, process.world_size)
    degrees = Degrees(
        process.rank, process.world_size, config.parallel.tensor, process.local_rank, process.local_size
    )
    device = find_device(config, process)
    limit_threads(os.environ)
    if config.training.bind_cores:
        bind_cores(process, device)  # before anything starts threads
    if config.training.deterministic:
        make_deterministic(os.environ)
    if device.type == "cuda":
        set_kernel_cache(os.environ)
    logging.getLogger(kernels.__name__).setLevel(logging.ERROR)  # the summary says which kernels run
    limit = config.training.collective_timeout_seconds
    start_processes(process, device, limit + _WATCH_SPEAKS_FIRST_SECONDS)
    watch = Watch(process, limit, Path(config.training.output_dir) / "stacks")
    try:
        status = _train(config, degrees, device, stop, watch)
        stop.ignore_more()
    except RuntimeError as error:
        watch.explain(error)  # does not return where another rank is gone
        raise
    finally:
        watch.close()
    stop_processes()  # only after success: a rank that left a collective must not wait for its peers here
    return status


def _train(config: Config, degrees: Degrees, device: torch.device, stop: StopRequest, watch: Watch) -> int:
    watch.entering("making process groups")
    groups = Groups(degrees, config.training.collective_timeout_seconds + _WATCH_SPEAKS_FIRST_SECONDS)
    run_on_all(partial(_choose_kernels, config, device), device)
    for phase in phases_of(config):
        run_on_all(partial(check_host_memory, phase.config, degrees), device)
    watch.entering("opening the data")
    if device.type == "cpu":
        keep_freed_memory()
    if config.logging.wandb.project:
        run_on_first(lambda: check_wandb(config), device)
    opened: dict[str, PhaseInputs] = {}
    open_rest = partial(open_phases, config, opened, degrees, device, stop.requested, watch.still_alive)
    if not open_rest(run_on_first(lambda: _first_look(config), device)):
        return _stopped("while text was prepared", degrees.rank)
    tasks = None
    if config.training.evaluate_tasks:
        watch.entering("loading the tasks to evaluate")
        tokenizer = next(iter(opened.values())).inputs.tokenizer
        tasks = open_tasks(config, tokenizer, device, stop.requested, watch.still_alive)
        if tasks is None:
            return _stopped("while tasks were loaded", degrees.rank)
    watch.entering("choosing a checkpoint")
    step = run_on_first(lambda: look_ahead(config, partial(read_state, config, opened, 0)), device)
    if step >= config.training.steps:
        if degrees.rank == 0:
            folder = config.training.output_dir
            print(f"{folder}: already at step {step} of {config.training.steps}; nothing to do", flush=True)
        return DONE
    chosen = choose_checkpoint(config, device, stop.requested, watch.still_alive)
    if chosen is None:
        return _stopped("while a checkpoint was verified", degrees.rank)
    fence, checkpoint = chosen
    # where the newest one was damaged, that may be one of an earlier phase
    if not open_rest(0 if checkpoint is None else checkpoint.manifest.step):
        return _stopped("while text was prepared", degrees.rank)
    shared = Shared(config, groups, device, tasks, stop, watch, Records(config, degrees.rank))
    try:
        return _train_phases(shared, opened, fence, checkpoint)
    finally:
        shared.records.close()


def _choose_kernels(config: Config, device: torch.device) -> None:
    """Has the process compute by `kernels.backend`; UserError where that cannot be."""
    backend = config.kernels.backend
    try:
        kernels.choose_backend(backend, device, getattr(torch, config.training.precision))
    except UnsupportedError as error:
        raise UserError(
            f"kernels.backend is {backend}, which cannot be used here: {error}: set kernels.backend=auto"
        ) from error


def _first_look(config: Config) -> int:
    """The step that the run seems to go on from."""
    check_folder(config)
    return look_ahead(config, lambda checkpoint: None)


def _train_phases(
    shared: Shared, opened: dict[str, PhaseInputs], fence: Fence, checkpoint: CheckpointReader | None
) -> int:
    """Train to the last step. A phase ends with a checkpoint, and the next one goes on from it as a restart would."""
    last: Path | None = None  # the checkpoint that ended a phase
    while True:
        run = PhaseRun(shared, opened, fence, checkpoint, continued=last is not None)
        try:
            status = run.run()
        finally:
            run.close()
        if status != DONE or run.step == shared.config.training.steps:
            return status
        last = run.saver.last
        run.engine.close()
        opened.pop(run.phase.name)
        del run  # weights, moments and buffers, before those of the next phase are made
        gc.collect()
        if shared.device.type == "cuda":
            torch.cuda.empty_cache()
        assert last is not None
        checkpoint = run_on_all(partial(CheckpointReader, last, check_sizes=False), shared.device)


def _stopped(when: str, rank: int) -> int:
    if rank == 0:
        print(f"stopped on request {when}; run the same command again to go on", flush=True)
    return STOPPED
