"""What the ZeRO stages add, send and when: gradients summed in float32, overlap, the collectives of a step."""

from __future__ import annotations

import functools
import math
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.collectives import Call, Collectives
from benchmarks.micro_batches import backward_passes
from mf_train.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import MOMENTS, Engine
from mf_train.parallel.groups import Groups, start_processes
from mf_train.parallel.processes import find_process
from mf_train.planning.work import data_parallel_bytes
from tests.distributed import run_distributed

pytestmark = pytest.mark.distributed

MODEL = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, bits=4, vocab_size=128, sequence_length=16)
BATCH, MICRO, STEPS = 8, 1, 3
CPU = torch.device("cpu")
STAGES, PRECISIONS = (0, 1, 2, 3), ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    stage: int
    precision: str
    overlap: bool = True
    reduce_dtype: str = "float32"
    bucket_size: int = 3000  # many buckets in this model
    offload: str = "none"

    def config(self) -> Config:
        return Config(
            model=MODEL,
            optimizer=OptimizerConfig(learning_rate=3e-3, gradient_clip=0, weight_decay=0.3),
            parallel=ParallelConfig(
                zero_stage=self.stage,
                overlap=self.overlap,
                reduce_dtype=self.reduce_dtype,  # type: ignore[arg-type]
                bucket_size=self.bucket_size,
                offload=self.offload,  # type: ignore[arg-type]
            ),
            training=TrainingConfig(
                global_batch_size=BATCH,
                micro_batch_size=MICRO,
                precision=self.precision,  # type: ignore[arg-type]
            ),
        )


@dataclass
class Outcome:
    """What a rank saw of three steps. Vectors are float32, of all parameters in the model's order."""

    own: Tensor  # the first step's gradients of this rank alone, added in float32
    own_size: Tensor  # the same of their absolute values
    reduced: Tensor  # by all ranks, as AdamW got them
    state: dict[str, Tensor]  # masters and moments after the last step
    losses: list[float]
    norms: list[float]
    calls: list[Call] = field(default_factory=list)  # of the last step


CASES = [Case(stage, precision) for stage in STAGES for precision in PRECISIONS]
PLAIN = [*CASES]
CASES += [replace(case, overlap=False) for case in CASES]
NARROW = [Case(stage, "bfloat16", reduce_dtype="bfloat16") for stage in (0, 1, 2)]
CASES += NARROW
OFFLOADED = [replace(case, offload="optimizer") for case in PLAIN]
CASES += OFFLOADED
QUICK = {1: PLAIN, 2: CASES, 4: PLAIN}  # by ranks; the drills run every case on 4


def on_ranks(cases: list[Case]) -> list[Any]:
    """Ranks and case, as parameters of a test."""
    return [
        pytest.param(ranks, case, marks=[] if case in QUICK[ranks] else [pytest.mark.slow])
        for ranks in (2, 4)
        for case in cases
    ]


def batch_of(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return (
        torch.rand(BATCH, MODEL.sequence_length + 1, generator=generator).pow(3) * MODEL.vocab_size
    ).long()


def train(rank: int, ranks: int, cases: list[Case]) -> list[Outcome]:
    start_processes(find_process(), CPU, 120)
    groups = Groups(Degrees(rank, ranks, 1), 120)
    return [train_case(case, groups) for case in cases]


def train_case(case: Case, groups: Groups) -> Outcome:
    engine = Engine(MemoryFormer(MODEL), case.config(), groups, CPU)
    degrees = groups.degrees
    own, size = own_gradients(case.precision, degrees.data_rank, degrees.data)
    outcome = Outcome(own, size, torch.empty(0), {}, [], [])
    collectives = Collectives()
    for step in range(STEPS):
        if step == 1:
            drop_step(engine, not_a_number=case.precision == "float32")
            assert engine.steps == step
        parts = batch_of(step)[degrees.data_rank :: degrees.data].tensor_split(engine.micro_batches)
        with collectives if step == STEPS - 1 else nullcontext():
            loss = backward_passes(engine, parts, BATCH)
            norm = engine.update(3e-3)
        dist.all_reduce(loss)
        outcome.losses.append(loss.item())
        outcome.norms.append(norm.item())
        if step == 0:
            # DeepSpeed drops it; AdamW's first moment is a share of it
            outcome.reduced = (
                whole(engine, "gradient") if case.stage < 3 else whole(engine, "exp_avg") / (1 - 0.9)
            )
        outcome.calls = collectives.calls
    outcome.state = {kind: whole(engine, kind) for kind in ("master", *MOMENTS)}
    engine.close()
    return outcome


def drop_step(engine: Engine, *, not_a_number: bool) -> None:
    """Another batch's gradients, which leave no trace in what follows."""
    degrees = engine.groups.degrees
    parts = batch_of(STEPS)[degrees.data_rank :: degrees.data].tensor_split(engine.micro_batches)
    for index, rows in enumerate(parts):
        share = math.nan if not_a_number else MICRO / BATCH
        engine.backward(rows[:, :-1], rows[:, 1:], share=share, last=index == len(parts) - 1)
    assert engine.gradient_norm().isfinite() == (not not_a_number)
    engine.drop()


@functools.cache
def own_gradients(precision: str, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """By torch alone: each row's gradients in the precision, added in float32; and their absolute values."""
    rows = batch_of(0)[rank::ranks]
    model = MemoryFormer(MODEL).to(getattr(torch, precision))
    sums, sizes = ([torch.zeros(p.shape) for p in model.parameters()] for _ in range(2))
    for row in rows.split(MICRO):
        loss = model(row[:, :-1], row[:, 1:]).mean() * (len(row) / BATCH)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        for total, size, gradient in zip(sums, sizes, gradients, strict=True):
            total += gradient
            size += gradient.abs()
    joined, joined_sizes = (torch.cat([each.flatten() for each in kind]) for kind in (sums, sizes))
    return joined, joined_sizes


def whole(engine: Engine, kind: str) -> Tensor:
    """Of all ranks, in the model's order."""
    parts, fragments = [], engine.fragments()
    for name, parameter in engine.model.named_parameters():
        flat = torch.zeros(engine.local_shape(parameter).numel())
        fragment = fragments.get(name)
        if fragment is not None and not (engine.replicated and engine.groups.degrees.data_rank):
            if kind == "gradient":
                assert fragment.gradient is not None
                held = fragment.gradient[: fragment.numel]
            else:
                held = fragment.held(kind).read()
            flat[fragment.start : fragment.start + fragment.numel] = held
        parts.append(flat)
    joined = torch.cat(parts)
    dist.all_reduce(joined)
    return joined


def outcomes(ranks: int, case: Case = PLAIN[0]) -> list[dict[Case, Outcome]]:
    """By rank: of the trainings among which this one is."""
    return _outcomes(ranks, quick=case in QUICK[ranks])


@functools.cache
def _outcomes(ranks: int, quick: bool) -> list[dict[Case, Outcome]]:
    cases = QUICK[ranks] if quick else CASES
    return [
        dict(zip(cases, found, strict=True)) for found in run_distributed(train, ranks, cases, timeout=300)
    ]


EVERY = [
    pytest.param(ranks, case, id=f"R{ranks}-stage{case.stage}-{case.precision}")
    for ranks in (1, 2, 4)
    for case in PLAIN
]


@pytest.mark.parametrize(("ranks", "case"), EVERY)
def test_gradients_of_ranks_are_added_in_float32(ranks: int, case: Case) -> None:
    """One rank: its sums, to the last bit. Several: float32's rounding, twice more where it is known by a moment."""
    found = outcomes(ranks)
    if ranks == 1 and case.stage < 3:
        assert torch.equal(found[0][case].reduced, found[0][case].own)
    # bfloat16 would round by 2^-9
    assert_sum(
        found[0][case].reduced, [outcome[case].own for outcome in found], [o[case].own_size for o in found]
    )


def assert_sum(actual: Tensor, addends: list[Tensor], sizes: list[Tensor]) -> None:
    """Each addend is a sum of BATCH / ranks numbers, of which `sizes` are the absolute values' sums."""
    expected, size = (torch.stack(each).double().sum(0) for each in (addends, sizes))
    error = (actual.double() - expected).abs()
    assert bool((error <= (BATCH + 6) * 2.0**-24 * size + 1e-30).all()), (error / size).nan_to_num().max()


@pytest.mark.parametrize(
    ("ranks", "case"), on_ranks([replace(case, overlap=False) for case in PLAIN]), ids=str
)
def test_overlap_changes_no_bit(ranks: int, case: Case) -> None:
    for outcome in outcomes(ranks, case):
        assert_equal(outcome[replace(case, overlap=True)], outcome[case])


@pytest.mark.parametrize(("ranks", "case"), on_ranks(OFFLOADED), ids=str)
def test_host_memory_changes_no_bit(ranks: int, case: Case) -> None:
    """But DeepSpeed's norm, which it adds up in another order there."""
    for outcome in outcomes(ranks, case):
        here, there = outcome[replace(case, offload="none")], outcome[case]
        if case.stage == 3:
            assert there.norms == pytest.approx(here.norms, rel=1e-6)
            there = replace(there, norms=here.norms)
        assert_equal(there, here)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_stages_0_and_1_have_the_same_bits(ranks: int, precision: str) -> None:
    for outcome in outcomes(ranks):
        assert_equal(outcome[Case(0, precision)], outcome[Case(1, precision)])


def assert_equal(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses and one.norms == other.norms
    for kind, values in one.state.items():
        assert torch.equal(values, other.state[kind]), kind


@pytest.mark.parametrize(("ranks", "case"), on_ranks(NARROW), ids=str)
def test_bfloat16_on_the_wire_rounds_each_rank_s_sums_once(ranks: int, case: Case) -> None:
    """Stage 2 sends a micro-batch's gradients, which are bfloat16 already: nothing is lost."""
    found = outcomes(ranks, case)
    other = found[0][replace(case, reduce_dtype="float32")].reduced
    assert torch.equal(found[0][case].reduced, other) == (case.stage == 2)
    if case.stage < 2:
        rounded = [outcome[case].own.bfloat16().float() for outcome in found]
        assert_sum(found[0][case].reduced, rounded, [outcome[case].own_size for outcome in found])


def kinds(outcome: Outcome) -> dict[str, int]:
    """Collectives of the last step but single numbers, by name and dtype."""
    found: dict[str, int] = {}
    for call in outcome.calls:
        if call.elements > 8:
            key = f"{call.name} {call.dtype}"
            found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_collectives_of_a_step(ranks: int, precision: str) -> None:
    """One for each bucket: gradients once a step (stages 0 and 1) or in each micro-batch, weights once."""
    found, micro_batches = outcomes(ranks)[0], BATCH // ranks // MICRO
    one = kinds(found[Case(1, precision)])
    buckets = one["reduce_scatter float32"]
    assert buckets > 5
    weights = f"all_gather {precision}"
    assert one == {"reduce_scatter float32": buckets, weights: buckets}
    assert kinds(found[Case(0, precision)]) == {
        "reduce_scatter float32": buckets,
        "all_gather float32": buckets,
    }
    assert kinds(found[Case(2, precision)]) == {
        "reduce_scatter float32": buckets * micro_batches,
        weights: buckets,
    }
    three = kinds(found[Case(3, precision)])
    assert set(three) == {"reduce_scatter float32", weights}
    parameters = len(list(MemoryFormer(MODEL).parameters()))
    # small parameters come and go with their neighbours
    assert three[weights] < parameters * micro_batches / 2


@pytest.mark.parametrize(("ranks", "case"), on_ranks(CASES), ids=str)
def test_bytes_are_those_of_the_plan(ranks: int, case: Case) -> None:
    outcome = outcomes(ranks, case)[0][case]
    sent = sum(call.sent_bytes for call in outcome.calls if call.elements > 8)
    planned = sum(data_parallel_bytes(case.config(), ranks).values())
    # buckets are filled up to whole shards: at most some elements for each of their parameters
    assert planned <= sent <= 1.1 * planned


STARTS = [
    Case(stage, precision, overlap)
    for stage in (0, 1, 2)
    for precision in PRECISIONS
    for overlap in (True, False)
]


@pytest.mark.parametrize(("ranks", "case"), on_ranks(STARTS), ids=str)
def test_reductions_start_while_the_backward_pass_runs(ranks: int, case: Case) -> None:
    outcome = outcomes(ranks, case)[0][case]
    reductions = [call for call in outcome.calls if call.name == "reduce_scatter"]
    early = [call for call in reductions if call.during_backward]
    if case.overlap:
        assert len(early) >= len(reductions) - 1
    elif case.stage < 2:
        assert not early


def test_ranks_agree_closer_than_their_gradients_rounded() -> None:
    """bfloat16, three steps: R = 1, 2 and 4."""
    losses = {ranks: outcomes(ranks)[0][Case(1, "bfloat16")].losses for ranks in (1, 2, 4)}
    for ranks in (2, 4):
        for a, b in zip(losses[ranks], losses[1], strict=True):
            assert abs(a - b) < 2e-3 * b
