"""ZeRO stages and degrees of parallelism: one training, whatever the number of processes.

Every combination is compared with torch's AdamW on the plain model in one process. The trainings run in one
start of 4 processes (tests/parallel/worlds.py).
"""

from __future__ import annotations

import functools
import gc
import math
from typing import Any

import pytest
import torch

from mf_train.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine, parameter_groups
from mf_train.parallel.groups import Groups, start_processes
from mf_train.parallel.processes import find_process
from tests.distributed import run_distributed
from tests.parallel.worlds import (
    MODEL,
    OPTIMIZER,
    Case,
    Record,
    batch_of,
    join,
    probe,
    run_worlds,
    train_plainly,
)
from tests.threads import threads
from tests.warm import free_port

pytestmark = pytest.mark.distributed

# In bfloat16 rounding flips codes, which changes the loss, and Adam moves a weight whose gradient is rounding alone as
# far as any other. So two trainings drift apart, about as far as one of them from float32's: that is the yardstick,
# since how far depends on the processor's instructions. At the first step they have not drifted (5e-8 and 5e-5 seen).
APART = 3
FIRST_LOSS, FIRST_NORM = 1e-6, 2**-10


def select(
    tensor: int,
    data: int,
    precision: str,
    stages: tuple[int, ...],
    documents: bool = False,
) -> list[Case]:
    return [Case(tensor, data, stage, precision, documents) for stage in stages]


EVERY = (0, 1, 2, 3)
# Ranks of the 4, and what they train: of degrees, stage and precision every pair, P = 4 aside, where most of the time
# would go on few cores. Larger worlds first (see run_worlds).
WORLDS = [
    (
        [0, 1, 2, 3],
        select(2, 2, "float32", (1, 3))
        + select(2, 2, "bfloat16", (0, 2))
        + select(2, 2, "float32", (3,), documents=True)
        + select(2, 2, "bfloat16", (2,), documents=True)
        + select(4, 1, "float32", (0,)),
    ),
    ([0, 1], select(2, 1, "float32", (0, 2)) + select(2, 1, "bfloat16", (1, 3))),
    ([2, 3], select(1, 2, "float32", (1, 3)) + select(1, 2, "bfloat16", (0, 2))),
    (
        [0],
        select(1, 1, "float32", (0, 2))
        + select(1, 1, "bfloat16", (1, 3))
        + select(1, 1, "float32", (0,), documents=True),
    ),
]
SLOW_WORLDS = [
    (
        [0, 1, 2, 3],
        select(2, 2, "float32", (0, 2))
        + select(2, 2, "bfloat16", (1, 3))
        + select(2, 2, "float32", (1,), documents=True)
        + select(4, 1, "float32", (1, 2, 3))
        + select(4, 1, "bfloat16", EVERY),
    ),
    ([0, 1], select(2, 1, "float32", (1, 3)) + select(2, 1, "bfloat16", (0, 2))),
    ([2, 3], select(1, 2, "float32", (0, 2)) + select(1, 2, "bfloat16", (1, 3))),
    ([0], select(1, 1, "float32", (1, 3)) + select(1, 1, "bfloat16", (0, 2))),
]


def cases_in(worlds: list[tuple[list[int], list[Case]]]) -> list[Case]:
    return [case for _, cases in worlds for case in cases]


FAST = set(cases_in(WORLDS))
CASES = [
    pytest.param(case, id=str(case), marks=[] if case in FAST else [pytest.mark.slow])
    for case in sorted(FAST | set(cases_in(SLOW_WORLDS)))
]
FLOAT32 = [p for p in CASES if p.values[0].precision == "float32"]


@functools.cache
def results(slow: bool) -> list[list[dict[str, Any]]]:
    """By rank, then by world."""
    worlds = [(members, free_port(), cases) for members, cases in (SLOW_WORLDS if slow else WORLDS)]
    return run_distributed(run_worlds, 4, worlds, timeout=900 if slow else 500)


def records_of(case: Case) -> list[Record]:
    """Of the case's ranks, in order."""
    slow = case not in FAST
    found = results(slow)
    [(index, members)] = [
        (index, members)
        for index, (members, cases) in enumerate(SLOW_WORLDS if slow else WORLDS)
        if case in cases
    ]
    return [found[rank][index][str(case)] for rank in members]


Plain = dict[tuple[str, bool], Record]  # by precision, and whether attention stays inside documents


@pytest.fixture(scope="module")
def plain() -> Plain:
    with threads(1):
        return {
            (precision, documents): train_plainly(precision, documents)
            for precision in ("float32", "bfloat16")
            for documents in (False, True)
        }


def whole(ranks: list[Record], kind: str) -> dict[str, torch.Tensor]:
    """A collected state of all tensor-parallel ranks, joined; of the gradients where `kind` is "gradients"."""
    holders = sorted((r for r in ranks if r.collected), key=lambda r: r.tensor_rank)
    return join([r.gradients if kind == "gradients" else r.state[kind] for r in holders])


def largest_error(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative norm of a parameter's difference, and the parameter's name."""
    assert actual.keys() == expected.keys()
    return max(
        (((actual[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-30)).item(), name)
        for name in expected
    )


def largest_relative(actual: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(actual, expected, strict=True))


def differences(record: Record, expected: Record, steps: int | None = None) -> tuple[float, float]:
    """The largest relative ones of losses and of norms, in the first `steps`."""
    return (
        largest_relative(record.losses[:steps], expected.losses[:steps]),
        largest_relative(record.norms[:steps], expected.norms[:steps]),
    )


def drift(*pairs: tuple[Record, Record]) -> tuple[float, float]:
    """How far two trainings in bfloat16 may be apart, losses and norms, from pairs of one in it and one in float32."""
    losses, norms = zip(*(differences(*pair) for pair in pairs), strict=True)
    return APART * max(losses), APART * max(norms)


def drift_of(plain: Plain) -> tuple[float, float]:
    return drift(*((plain["bfloat16", each], plain["float32", each]) for each in (False, True)))


def test_the_trainings_are_worth_comparing(plain: Plain) -> None:
    for record in plain.values():
        assert min(record.norms) > 2 * OPTIMIZER.gradient_clip
        assert record.losses[0] - record.losses[-1] > 0.1


@pytest.mark.parametrize("case", CASES)
def test_the_loss_curve(case: Case, plain: Plain) -> None:
    """Float32: 1e-5. bfloat16: as stated above."""
    expected = plain[case.precision, case.documents]
    ranks = records_of(case)
    loss_bound, norm_bound = (1e-5, 1e-4) if case.precision == "float32" else drift_of(plain)
    for record in ranks:
        assert record.losses == ranks[0].losses and record.norms == ranks[0].norms
        loss, norm = differences(record, expected)
        first_loss, first_norm = differences(record, expected, steps=1)
        print(f"{case}: relative differences of losses {loss:.1e}, at first {first_loss:.1e}")
        print(f"{case}: relative differences of norms {norm:.1e}, at first {first_norm:.1e}")
        assert first_loss < FIRST_LOSS and first_norm < FIRST_NORM
        assert loss < loss_bound and norm < norm_bound


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_first_step(case: Case, plain: Plain) -> None:
    error, name = largest_error(
        whole(records_of(case), "gradients"), plain[case.precision, case.documents].gradients
    )
    print(f"{case}: {error:.1e} ({name})")
    assert error < (1e-4 if case.precision == "float32" else 3e-2), name


@pytest.mark.parametrize("case", FLOAT32)
def test_weights_and_moments_after_five_steps(case: Case, plain: Plain) -> None:
    # most of a key's bias adds the same to every score of a query: its gradient is rounding alone, which Adam follows
    for kind in ("master", "exp_avg", "exp_avg_sq", "average"):
        actual, expected = whole(records_of(case), kind), plain["float32", case.documents].state[kind]
        for names, bound in (
            ([name for name in expected if not name.endswith("key.bias")], 2e-5),
            ([name for name in expected if name.endswith("key.bias")], 1e-3),
        ):
            error, name = largest_error({n: actual[n] for n in names}, {n: expected[n] for n in names})
            print(f"{case} {kind}: {error:.1e} ({name})")
            assert error < bound, (kind, name)


@pytest.mark.parametrize("case", FLOAT32)
def test_codes_hardly_flip(case: Case, plain: Plain) -> None:
    """Codes of the probe after 1, 5 and 10 steps against the plain run's; a value at rounding distance may flip."""
    flips, total = 0, 0
    for ours, theirs in zip(records_of(case)[0].codes, plain["float32", case.documents].codes, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 3 * MODEL.num_layers
        for name, codes in theirs.items():
            flips += int((ours[name] != codes).sum())
            total += codes.numel()
    print(f"{case}: {flips} of {total} codes flipped")
    assert flips <= 5 and total > 5000


@pytest.mark.parametrize("case", CASES)
def test_validation_loss(case: Case, plain: Plain) -> None:
    expected = plain[case.precision, case.documents].validation
    other = plain[case.precision, not case.documents].validation
    bound = 1e-5 if case.precision == "float32" else drift_of(plain)[0]
    assert (
        abs(other - expected) > 1e-4 * expected
    )  # float32 would notice the other mask, and so would gradients
    for record in records_of(case):
        error = abs(record.validation - expected)
        print(f"{case}: {error / expected:.1e}")
        assert error < bound * expected


@pytest.mark.parametrize("case", CASES)
def test_every_element_is_kept_once(case: Case) -> None:
    """Across tensor- and, from stage 1 on, data-parallel ranks."""
    copies = case.data if case.stage == 0 else 1
    for name, parameter in MemoryFormer(MODEL).named_parameters():
        held = sum(record.held.get(name, 0) for record in records_of(case))
        assert held == copies * parameter.numel(), name


@pytest.mark.parametrize("case", CASES)
def test_collected_masters_are_the_model(case: Case) -> None:
    """A plain model with the collected masters has the engine's losses; so again after they were changed in place."""
    for kind, losses in (("master", "as it is"), ("halved", "halved")):
        model = MemoryFormer(MODEL)
        model.load_state_dict(whole(records_of(case), kind))
        model.to(getattr(torch, case.precision))
        with torch.no_grad():
            expected = model(probe()[:, :-1], probe()[:, 1:])
        for record in records_of(case):
            torch.testing.assert_close(record.probe_losses[losses], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("index", [0, 1], ids=["P2", "P4"])
def test_cross_entropy_is_megatron_s(index: int) -> None:
    for rank in range(4):
        loss_error, gradient_error = results(False)[rank][0]["cross-entropy"][index]
        assert loss_error < 1e-5 and gradient_error < 1e-6


@pytest.mark.parametrize(
    "kind",
    [{}, {"kind": "dense"}, {"qkv": "low_rank", "rank": 4}, {"ffn": "product_key", "product_keys": 20}],
    ids=["memoryformer", "dense", "hybrid", "product keys"],
)
def test_parameter_groups(kind: dict[str, Any]) -> None:
    """Each parameter in one group; its decay and multiplier follow from its name."""
    model = MemoryFormer(
        ModelConfig(hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=32, **kind)
    )
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.3, table_learning_rate_multiplier=2.5))
    assert len(groups) == (3 if "kind" not in kind else 2)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            small = name.endswith(".bias") or "norm" in name
            assert group["weight_decay"] == (0.0 if small else 0.3), name
            assert group["learning_rate_multiplier"] == (2.5 if name.endswith(".tables") else 1.0), name
    assert sorted(seen) == sorted(names.values())
    # in the order in which checkpoints of ZeRO 3 before there were groups were trained
    matrices = [name for name, p in model.named_parameters() if p.dim() > 1 and not name.endswith(".tables")]
    assert [names[id(p)] for p in groups[-2]["params"]] == matrices


def norms_with_z_loss(rank: int, world_size: int) -> list[tuple[float, float]]:
    """Of each stage, a step's gradient norm, and by autograd that of the loss as it is written."""
    start_processes(find_process(), torch.device("cpu"), 60)
    groups, tokens, z_loss = Groups(Degrees(0, 1, 1), 60), batch_of(1), 1e-2
    plain = MemoryFormer(MODEL)
    logits = plain(tokens[:, :-1]).double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    (losses + z_loss * logits.logsumexp(-1).square()).mean().backward()
    expected = torch.cat([p.grad.double().flatten() for p in plain.parameters() if p.grad is not None]).norm()
    found = []
    for stage in (3, 1):
        config = Config(
            model=MODEL,
            parallel=ParallelConfig(zero_stage=stage),
            training=TrainingConfig(
                z_loss=z_loss, global_batch_size=len(tokens), micro_batch_size=len(tokens)
            ),
        )
        engine = Engine(MemoryFormer(MODEL), config, groups, torch.device("cpu"))
        loss = engine.backward(tokens[:, :-1], tokens[:, 1:], share=1.0, last=True)
        assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
        found.append((engine.gradient_norm().item(), expected.item()))
        engine.drop()
        engine.close()
    return found


def test_z_loss() -> None:
    for norm, expected in run_distributed(norms_with_z_loss, 1)[0]:
        assert norm == pytest.approx(expected, rel=1e-5)


def kept_after_closing(rank: int, world_size: int) -> list[int]:
    """Bytes of the tensors that are there after an engine of each stage has gone, less those of before."""
    start_processes(find_process(), torch.device("cpu"), 60)
    groups, tokens = Groups(Degrees(0, 1, 1), 60), batch_of(1)
    found = []
    for stage in EVERY:
        before = tensor_bytes()
        config = Config(
            model=MODEL,
            parallel=ParallelConfig(zero_stage=stage),
            training=TrainingConfig(global_batch_size=len(tokens), micro_batch_size=len(tokens)),
        )
        engine = Engine(MemoryFormer(MODEL), config, groups, torch.device("cpu"))
        engine.backward(tokens[:, :-1], tokens[:, 1:], share=1.0, last=True)
        engine.update(1e-3)
        assert tensor_bytes() > before + 12 * sum(math.prod(shape) for shape in engine_shapes(engine))
        engine.close()
        del engine
        found.append(tensor_bytes() - before)
    return found


def engine_shapes(engine: Engine) -> list[torch.Size]:
    return [engine.local_shape(parameter) for parameter in engine.model.parameters()]


def tensor_bytes() -> int:
    """Of all storages that Python's tensors hold."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes() for each in storages}.values())


def test_a_closed_engine_keeps_no_memory() -> None:
    """The next phase of a run makes another one in the same process."""
    for kept in run_distributed(kept_after_closing, 1)[0]:
        assert kept < 1000
