"""What test_trainer.py and test_repeats.py look at, trained in one start of processes: a start takes longer than these.

Every action is tried by itself: what fails leaves its traceback as its result, and the others run.
"""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.micro_batches import backward_passes
from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.model.initialise import initialise
from mf_train.parallel.engine import Engine
from mf_train.parallel.groups import start_processes, stop_processes
from mf_train.parallel.processes import Process
from tests.checkpoint import elastic
from tests.distributed import run_distributed
from tests.parallel.worlds import OPTIMIZER, Case, Weights, collect, make_groups, run_case, train_plainly
from tests.warm import free_port

STAGES = (0, 1, 2, 3)
PRECISIONS = ("float32", "bfloat16")
ATTENTIONS = ("as the trainer runs it", "by torch's math operations")
TIME_LIMIT = 240.0  # seconds, of a start


@dataclass(frozen=True)
class Failure:
    """An action's traceback."""

    text: str


@dataclass
class Repeat:
    """One of two trainings that are the same in all but the moment they run."""

    losses: list[float]
    norms: list[float]
    masters: Weights


def device_of(rank: int, kind: str) -> torch.device:
    return torch.device(kind, rank) if kind == "cuda" else torch.device(kind)


def cases_of(tensor: int, data: int) -> list[Case]:
    """Every stage in both precisions, and attention inside documents in two of them."""
    plain = [Case(tensor, data, stage, precision) for stage in STAGES for precision in PRECISIONS]
    documents = [Case(tensor, data, 1, "float32"), Case(tensor, data, 2, "bfloat16")]
    return plain + [replace(case, documents=True) for case in documents]


def pairs_of(tensor: int, data: int) -> dict[Case, list[Case]]:
    """Whose checkpoints each reads: in float32 its own and the next stage's, in bfloat16 its own."""
    float32 = [Case(tensor, data, stage, "float32") for stage in STAGES]
    pairs = {case: [case, float32[(case.stage + 1) % 4]] for case in float32}
    return pairs | {case: [case] for case in (replace(c, precision="bfloat16") for c in float32)}


def run_trainings(device: str, tensor: int, data: int, folder: Path) -> list[dict[Any, Any]]:
    """All of one pair of degrees; each rank's results by what they are of."""
    arguments = (device, tensor, data, folder, free_port())
    return run_distributed(_run_rank, tensor * data, *arguments, timeout=TIME_LIMIT)


def _run_rank(
    rank: int, world_size: int, kind: str, tensor: int, data: int, folder: Path, port: int
) -> dict[Any, Any]:
    device = device_of(rank, kind)
    found: dict[Any, Any] = {}

    def attempt(name: Any, action: Callable[[], Any]) -> None:
        try:
            found[name] = action()
        except Exception:
            if world_size > 1:  # the others would wait for this rank
                raise
            found[name] = Failure(traceback.format_exc())

    if rank == 0:
        for documents in (False, True):
            attempt(("float64", documents), lambda d=documents: train_plainly("float64", d))
            for precision in PRECISIONS:
                attempt((precision, documents), lambda p=precision, d=documents: train_plainly(p, d, device))
    process = Process(rank, world_size, rank, "127.0.0.1", port, world_size)
    start_processes(process, device, 120)
    for case in cases_of(tensor, data):
        attempt(case, lambda c=case: run_case(c, process, device))
    pairs = pairs_of(tensor, data)
    for writer in pairs:
        attempt(("wrote", writer), lambda w=writer: elastic.write(w, process, folder, device))
    gc.freeze()  # ZeRO 3 collects garbage at each load, which else takes longest of all
    for reader, writers in pairs.items():
        attempt(
            ("read", reader),
            lambda r=reader, w=writers: elastic.read(r, process, w, folder, 3, device),
        )
    stop_processes()
    return found


def run_repeats(device: str) -> dict[Any, Any]:
    """Pairs of `Repeat` by precision and attention."""
    return run_distributed(_run_pairs, 1, device, free_port(), timeout=TIME_LIMIT)[0]


def _run_pairs(rank: int, world_size: int, kind: str, port: int) -> dict[Any, Any]:
    device, process = device_of(rank, kind), Process(0, 1, 0, "127.0.0.1", port, 1)
    start_processes(process, device, 120)
    found: dict[Any, Any] = {}
    for precision in PRECISIONS:
        for attention in ATTENTIONS:
            try:
                found[precision, attention] = [
                    train_long(precision, attention, process, device) for _ in range(2)
                ]
            except Exception:
                found[precision, attention] = Failure(traceback.format_exc())
    stop_processes()
    return found


LONG = ModelConfig(
    hidden_size=128, num_layers=2, num_heads=2, bits=4, expand_bits=2, vocab_size=256, sequence_length=512
)


def train_long(precision: str, attention: str, process: Process, device: torch.device) -> Repeat:
    """5 steps on sequences of several blocks of the attention's kernels, whose backward may add blocks in any order."""
    config = Config(
        model=LONG,
        optimizer=OPTIMIZER,
        parallel=ParallelConfig(zero_stage=1),
        training=TrainingConfig(global_batch_size=4, micro_batch_size=2, precision=precision),
    )
    with torch.device("meta"):
        model = MemoryFormer(LONG)
    model.to_empty(device=device)
    initialise(model, 0)
    engine = Engine(model, config, make_groups(process, 1), device)
    repeat = Repeat([], [], {})
    generator = torch.Generator().manual_seed(3)
    with nullcontext() if attention == ATTENTIONS[0] else sdpa_kernel(SDPBackend.MATH):
        for _ in range(5):
            rows = (256 * torch.rand(4, LONG.sequence_length + 1, generator=generator).pow(3)).long()
            repeat.losses.append(backward_passes(engine, rows.to(device).split(2), 4).item())
            repeat.norms.append(engine.update(OPTIMIZER.learning_rate).item())
    repeat.masters = collect(engine, "master", 0)
    engine.close()
    return repeat
