"""Recomputed activations: the same training to the last bit, the same collectives and reads, less memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.collectives import Collectives
from benchmarks.micro_batches import backward_passes
from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.model.attention.masks import document_numbers
from mf_train.parallel import zero3
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import Groups, start_processes, stop_processes
from mf_train.parallel.processes import Process
from mf_train.parallel.recompute import recompute_blocks
from mf_train.parallel.tensor import build_model
from mf_train.telemetry.counts import ReadCounts
from tests.distributed import run_distributed
from tests.models import random_model
from tests.warm import free_port

CPU = torch.device("cpu")
MODEL = ModelConfig(
    hidden_size=64, num_layers=3, num_heads=4, bits=4, expand_bits=2, vocab_size=128, sequence_length=24
)
MODELS = {
    "paper": MODEL,
    "activation": replace(MODEL, ffn_activation="gelu", norm="rmsnorm"),
    "dense": replace(MODEL, kind="dense"),
    "product keys": replace(MODEL, ffn="product_key", product_keys=20, product_query=8, product_reads=4),
    "hybrid": replace(MODEL, qkv="low_rank", output="memory", rank=16, rotation=True),
}
deepspeed_config = zero3._deepspeed_config
END_OF_TEXT, BATCH, MICRO, STEPS = 3, 8, 2, 2


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_the_plain_model(kind: str, dtype: torch.dtype, documents: bool) -> None:
    plain, recomputed = (random_model(MODELS[kind], 1, dtype, std=0.2) for _ in range(2))
    recompute_blocks(recomputed, None)
    assert list(dict(plain.named_parameters())) == list(dict(recomputed.named_parameters()))
    tokens = batch_of(0)
    numbers = document_numbers(tokens[:, :-1], END_OF_TEXT) if documents else None
    losses = [model(tokens[:, :-1], tokens[:, 1:], documents_bs=numbers) for model in (plain, recomputed)]
    assert torch.equal(*losses)
    for each in losses:
        each.mean().backward()
    for (name, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name


def test_a_pass_without_gradients_runs_once() -> None:
    model = random_model(MODEL, 2, torch.float32)
    expected = model(batch_of(1))
    recompute_blocks(model, None)
    with torch.no_grad():
        assert torch.equal(model(batch_of(1)), expected)


def test_blocks_keep_their_inputs_alone() -> None:
    """Between the passes: what the plain model keeps grows with depth by all of a block's activations."""
    tokens = torch.randint(128, (8, 25), generator=torch.Generator().manual_seed(3))

    def kept(layers: int, recompute: bool) -> int:
        model = MemoryFormer(replace(MODEL, num_layers=layers))
        if recompute:
            recompute_blocks(model, None)
        with torch.profiler.profile(profile_memory=True) as profile:
            losses = model(tokens[:, :-1], tokens[:, 1:])
        losses.mean().backward()
        return sum(event.self_cpu_memory_usage for event in profile.events())  # allocated and not freed

    plain, recomputed = (kept(6, recompute) - kept(3, recompute) for recompute in (False, True))
    block_input = 8 * 24 * MODEL.hidden_size * 4
    assert recomputed == 3 * block_input
    assert plain > 8 * recomputed


# in ranks


@dataclass(frozen=True, order=True)
class Case:
    tensor: int
    data: int
    stage: int
    precision: str
    gathered: bool = True  # stage 3: parameters stay, as in a model of up to 10^9; else each use gathers them

    def __str__(self) -> str:
        again = "" if self.gathered else "-gathered-again"
        return f"P{self.tensor}-R{self.data}-stage{self.stage}-{self.precision}{again}"


def select(tensor: int, data: int, precision: str, *stages: int) -> list[Case]:
    return [Case(tensor, data, stage, precision) for stage in stages]


# Ranks of 4, and what they train; larger worlds first (tests/parallel/worlds.py).
WORLDS = [
    (
        [0, 1, 2, 3],
        select(4, 1, "float32", 0)
        + select(2, 2, "float32", 0, 1, 2, 3)
        + select(2, 2, "bfloat16", 1, 3)
        + [Case(2, 2, 3, "bfloat16", gathered=False)],
    ),
    ([0, 1], select(2, 1, "bfloat16", 0, 2)),
    (
        [2, 3],
        select(1, 2, "float32", 0, 3)
        + select(1, 2, "bfloat16", 1, 2)
        + [Case(1, 2, 3, "float32", gathered=False)],
    ),
    ([0], select(1, 1, "float32", 1, 3) + select(1, 1, "bfloat16", 0, 3)),
]
CASES = sorted(case for _, cases in WORLDS for case in cases)
# the default run has each degree, stage and precision; the drills all
QUICK = {
    *select(4, 1, "float32", 0),
    *select(2, 2, "float32", 1, 3),
    *select(2, 1, "bfloat16", 2),
    Case(1, 2, 3, "float32", gathered=False),
    *select(1, 1, "bfloat16", 0),
}


def batch_of(step: int) -> Tensor:
    tokens = torch.randint(128, (BATCH, 25), generator=torch.Generator().manual_seed(step))
    tokens[:, 7::9] = END_OF_TEXT
    return tokens


def gathers_again(*arguments: Any) -> dict[str, Any]:
    settings = deepspeed_config(*arguments)
    settings["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
    return settings


def train_case(case: Case, groups: Groups, recompute: bool) -> dict[str, Any]:
    """What a rank sees of two steps: all that must be the same with and without recomputation."""
    config = Config(
        model=MODEL,
        parallel=ParallelConfig(tensor=case.tensor, zero_stage=case.stage),
        training=TrainingConfig(global_batch_size=BATCH, micro_batch_size=MICRO, precision=case.precision),  # type: ignore[arg-type]
    )
    degrees = groups.degrees
    exchange = Exchange(groups.tensor) if case.tensor > 1 else None
    model = build_model(MODEL, exchange, 0, CPU)
    if recompute:
        recompute_blocks(model, exchange)
    with pytest.MonkeyPatch.context() as patch:
        if not case.gathered:
            patch.setattr(zero3, "_deepspeed_config", gathers_again)
        engine = Engine(model, config, groups, CPU)
    counts = ReadCounts(model, MODEL.num_tables, CPU, degrees.tensor_rank, degrees.tensor)
    found: dict[str, Any] = {"losses": [], "norms": []}
    with Collectives() as collectives:
        for step in range(STEPS):
            rows_of_rank = batch_of(step)[degrees.data_rank :: degrees.data].split(MICRO)
            with counts.counting():
                found["losses"].append(backward_passes(engine, rows_of_rank, BATCH).item())
            found["norms"].append(engine.update(1e-2).item())
    for kind in ("master", "exp_avg"):
        found[kind] = {
            name: fragment.held(kind).read().clone() for name, fragment in engine.fragments().items()
        }
    found["reads"] = counts.values.tolist()
    found["sent"] = exchange.bytes_sent if exchange else 0
    found["collectives"] = sorted(
        (call.name, call.dtype, call.elements, call.group)
        for call in collectives.calls
        # stage 3 gathers parameters in the order that it saw modules run in, so again where they run again
        if case.stage < 3 or (case.tensor > 1 and call.group == groups.tensor.group_name)
    )
    engine.close()
    return found


def run_worlds(rank: int, world_size: int, worlds: list[tuple[list[int], int, list[Case]]]) -> dict[str, Any]:
    """By case: what this rank saw without and with recomputation."""
    found = {}
    for members, port, cases in worlds:
        if rank not in members:
            continue
        process = Process(members.index(rank), len(members), 0, "127.0.0.1", port)
        start_processes(process, CPU, 120)
        make_groups = functools.cache(
            lambda tensor, process=process: Groups(Degrees(process.rank, process.world_size, tensor), 120)
        )
        for case in cases:
            groups = make_groups(case.tensor)
            found[str(case)] = [train_case(case, groups, recompute) for recompute in (False, True)]
        stop_processes()
    return found


@functools.cache
def results(quick: bool) -> list[dict[str, Any]]:
    """By rank."""
    chosen = [(ranks, [case for case in cases if (case in QUICK) == quick]) for ranks, cases in WORLDS]
    return run_distributed(
        run_worlds, 4, [(ranks, free_port(), cases) for ranks, cases in chosen if cases], timeout=400
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_one_training(case: Case) -> None:
    seen = [found[str(case)] for found in results(case in QUICK) if str(case) in found]
    assert len(seen) == case.tensor * case.data
    for plain, recomputed in seen:
        for key in ("losses", "norms", "reads", "sent", "collectives"):
            assert recomputed[key] == plain[key], key
        assert sum(plain["reads"]) > 0 and (plain["sent"] > 0) == (case.tensor > 1)
        for key in ("master", "exp_avg"):
            assert recomputed[key].keys() == plain[key].keys() != set()
            for name, value in plain[key].items():
                assert torch.equal(recomputed[key][name], value), (key, name)
