"""Checkpoints written by every shape of a training and read by every other: worlds of 4, 2 and 1 processes at once."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mf_train.checkpoint.fence import Fence, claim
from mf_train.checkpoint.layout import AVERAGE, KINDS, step_name
from mf_train.checkpoint.load import load_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.save import Extras, Saver
from mf_train.config import CheckpointConfig
from mf_train.model.sharding import slice_of_rank
from mf_train.parallel.agreement import run_on_first
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import start_processes, stop_processes
from mf_train.parallel.processes import Process
from mf_train.parallel.tensor import build_model
from tests.parallel.worlds import (
    BATCH,
    CPU,
    MODEL,
    OPTIMIZER,
    Case,
    Weights,
    batch_of,
    case_config,
    join,
    make_groups,
)

SAVED_STEP = 5  # of `train_plainly`, which records its state there


@dataclass
class Resumed:
    """What one rank saw of a training that went on from a checkpoint."""

    wrong: list[str]  # what it held, before the first step, in other bits than the files
    steps: set[float]  # Adam's counts of updates
    losses: list[float]
    norms: list[float]


@dataclass
class World:
    """Processes that train together, by their ranks among all; what they write, and what they read by reader."""

    members: list[int]
    port: int
    write: list[Case]
    read: dict[Case, list[Case]]


Results = dict[tuple[Case, Case | None], Any]


def run_world(rank: int, world_size: int, folder: Path, worlds: list[World], steps: int) -> Results:
    """All of this rank's world. Its results by reader and writer.

    Of a writer (its reader is None), what its files hold in other bits than the engine; of a pair, a `Resumed`.
    A process stays in one world: DeepSpeed numbers parameters and modules through the life of a process, and compares
    the numbers between ranks.
    """
    found: Results = {}
    [world] = [world for world in worlds if rank in world.members]
    process = Process(world.members.index(rank), len(world.members), 0, "127.0.0.1", world.port)
    start_processes(process, CPU, 120)
    for case in world.write:
        found[case, None] = write(case, process, folder)
    for case, sources in world.read.items():
        found |= read(case, process, sources, folder, steps)
    stop_processes()
    return found


def write(case: Case, process: Process, folder: Path, device: torch.device = CPU) -> list[str]:
    engine = build(case, process, device)
    for step in range(1, SAVED_STEP + 1):
        train_step(engine, step)
    place = folder / str(case)
    fence = Fence(place, run_on_first(lambda: claim(place).token, device))
    saver = Saver(engine, fence, CheckpointConfig(keep=0, asynchronous=case.stage % 2 == 0))
    extras = Extras(state={}, config_yaml="", tokenizer={}, probe={})
    saver.start(SAVED_STEP, extras if process.rank == 0 else None, wait=False)
    saver.finish()
    assert saver.last == checkpoint_of(case, folder)
    wrong = differing(engine, whole_tensors(saver.last, case.tensor))
    engine.close()
    return wrong


def read(
    case: Case,
    process: Process,
    sources: list[Case],
    folder: Path,
    steps: int,
    device: torch.device = CPU,
) -> Results:
    """One engine that goes on from one checkpoint after another."""
    engine = build(case, process, device)
    found: Results = {}
    for source in sources:
        path = checkpoint_of(source, folder)
        while not path.exists():  # another world is writing it
            time.sleep(0.1)
        load_checkpoint(engine, CheckpointReader(path))
        wrong = differing(engine, whole_tensors(path, source.tensor))
        counts = {float(engine.steps)}
        curve = [train_step(engine, SAVED_STEP + 1 + i) for i in range(steps)]
        found[case, source] = Resumed(wrong, counts, [loss for loss, _ in curve], [norm for _, norm in curve])
    engine.close()
    return found


def checkpoint_of(case: Case, folder: Path) -> Path:
    return folder / str(case) / step_name(SAVED_STEP)


def build(case: Case, process: Process, device: torch.device = CPU) -> Engine:
    config = case_config(case)
    micro = BATCH // case.data  # no accumulation
    config = replace(config, training=replace(config.training, micro_batch_size=micro))
    groups = make_groups(process, case.tensor)
    model = build_model(MODEL, Exchange(groups.tensor) if case.tensor > 1 else None, 0, device)
    return Engine(model, config, groups, device)


def train_step(engine: Engine, step: int) -> tuple[float, float]:
    """Mean loss over all ranks, and the gradient's norm."""
    degrees = engine.groups.degrees
    rows = batch_of(step).to(engine.device)[degrees.data_rank :: degrees.data]
    loss = engine.backward(rows[:, :-1], rows[:, 1:], share=1 / degrees.data, last=True).double()
    dist.all_reduce(loss, group=engine.groups.data)
    return loss.item(), engine.update(OPTIMIZER.learning_rate).item()


@functools.cache
def whole_tensors(checkpoint: Path, tensor: int) -> dict[str, Weights]:
    """Whole tensors by kind, read by the safetensors library alone."""
    found = {}
    for kind in (*KINDS, AVERAGE):
        prefix = "weights" if kind == "master" else kind
        ranks = []
        for rank in range(tensor):
            parts = sorted(checkpoint.glob(f"{prefix}-{rank}-of-{tensor}-part-*.safetensors"))
            ranks.append({name: value for part in parts for name, value in load_file(part).items()})
        found[kind] = join(ranks)
    return found


def differing(engine: Engine, whole: dict[str, Weights]) -> list[str]:
    """Kinds and names of what this rank holds in other bits than the tensors given, which it may hold in fewer."""
    degrees = engine.groups.degrees
    wrong = []
    for name, fragment in engine.fragments().items():
        for kind in (*KINDS, AVERAGE):
            held = fragment.held(kind)
            local = slice_of_rank(whole[kind][name], name, degrees.tensor_rank, degrees.tensor).reshape(-1)
            expected = replace(held, tensors=tuple(torch.empty_like(tensor) for tensor in held.tensors))
            expected.write(local[fragment.start : fragment.start + fragment.numel].to(engine.device))
            if not torch.equal(held.read().view(torch.int32), expected.read().view(torch.int32)):
                wrong.append(f"{kind} of {name}")
    return wrong
