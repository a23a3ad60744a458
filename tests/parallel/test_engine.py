"""ZeRO stages and degrees of parallelism: one training, whatever the number of processes.

Every combination is compared with torch's AdamW on the plain model in one process. The trainings run in one
start of 4 processes (tests/parallel/worlds.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mf_train.config import ModelConfig, OptimizerConfig
from mf_train.model import MemoryFormer
from mf_train.parallel.engine import parameter_groups
from tests.distributed import _free_port, run_distributed
from tests.parallel.worlds import (
    MODEL,
    OPTIMIZER,
    Case,
    Record,
    join,
    probe,
    run_worlds,
    train_plainly,
)

pytestmark = pytest.mark.distributed

PRECISIONS = ("float32", "bfloat16")


def cases_of(tensor: int, data: int, stages: tuple[int, ...] = (0, 1, 2, 3)) -> list[Case]:
    return [Case(tensor, data, stage, precision) for precision in PRECISIONS for stage in stages]


WARM = [Case(2, 2, stage, precision, warm=True) for precision in PRECISIONS for stage in range(4)]
WORLDS = [
    ([0, 1, 2, 3], cases_of(2, 2) + WARM + cases_of(4, 1, (0, 1))),
    ([0, 1], cases_of(2, 1)),
    ([2, 3], cases_of(1, 2)),
    ([0], cases_of(1, 1)),
]
CASES = [case for _, cases in WORLDS for case in cases if not case.warm]
FLOAT32 = [case for case in CASES if case.precision == "float32"]


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    """By rank, then by world."""
    worlds = [(members, _free_port(), cases) for members, cases in WORLDS]
    return run_distributed(run_worlds, 4, worlds, timeout=500)


@pytest.fixture(scope="module")
def records(found: list[list[dict[str, Any]]]) -> dict[Case, list[Record]]:
    """Of each case's ranks, in order."""
    return {
        case: [found[rank][index][str(case)] for rank in members]
        for index, (members, cases) in enumerate(WORLDS)
        for case in cases
    }


@pytest.fixture(scope="module")
def plain() -> dict[str, Record]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    trained = {precision: train_plainly(precision) for precision in PRECISIONS}
    torch.set_num_threads(threads)
    return trained


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


def test_the_trainings_are_worth_comparing(plain: dict[str, Record]) -> None:
    for record in plain.values():
        assert min(record.norms) > 2 * OPTIMIZER.gradient_clip
        assert record.losses[0] - record.losses[-1] > 0.1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_curve(case: Case, records: dict[Case, list[Record]], plain: dict[str, Record]) -> None:
    """Float32: 1e-5. bfloat16: BFLOAT16_LOSS, as a code that flips changes the loss, and Adam divides gradients by
    their size, so that rounding moves weights whose gradient is small as far as others.
    """
    expected = plain[case.precision]
    loss_bound, norm_bound = (1e-5, 1e-4) if case.precision == "float32" else (BFLOAT16_LOSS, BFLOAT16_NORM)
    for record in records[case]:
        assert record.losses == records[case][0].losses and record.norms == records[case][0].norms
        loss, norm = (
            largest_relative(record.losses, expected.losses),
            largest_relative(record.norms, expected.norms),
        )
        print(f"{case}: largest relative difference of losses {loss:.1e}, of norms {norm:.1e}")
        assert loss < loss_bound and norm < norm_bound


BFLOAT16_LOSS, BFLOAT16_NORM = 2e-3, 5e-2


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_the_first_step(
    case: Case, records: dict[Case, list[Record]], plain: dict[str, Record]
) -> None:
    error, name = largest_error(whole(records[case], "gradients"), plain[case.precision].gradients)
    print(f"{case}: {error:.1e} ({name})")
    assert error < (1e-4 if case.precision == "float32" else 3e-2), name


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_weights_and_moments_after_five_steps(
    case: Case, records: dict[Case, list[Record]], plain: dict[str, Record]
) -> None:
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        error, name = largest_error(whole(records[case], kind), plain["float32"].state[kind])
        print(f"{case} {kind}: {error:.1e} ({name})")
        assert error < 1e-4, (kind, name)


@pytest.mark.parametrize("case", FLOAT32, ids=str)
def test_codes_hardly_flip(case: Case, records: dict[Case, list[Record]], plain: dict[str, Record]) -> None:
    """Codes of the probe after 1, 5 and 10 steps against the plain run's; a value at rounding distance may flip."""
    flips, total = 0, 0
    for ours, theirs in zip(records[case][0].codes, plain["float32"].codes, strict=True):
        assert ours.keys() == theirs.keys() and len(ours) == 3 * MODEL.num_layers
        for name, codes in theirs.items():
            flips += int((ours[name] != codes).sum())
            total += codes.numel()
    print(f"{case}: {flips} of {total} codes flipped")
    assert flips <= 5 and total > 5000


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_kept_once(case: Case, records: dict[Case, list[Record]]) -> None:
    """Across tensor- and, from stage 1 on, data-parallel ranks."""
    copies = case.data if case.stage == 0 else 1
    for name, parameter in MemoryFormer(MODEL).named_parameters():
        held = sum(record.held.get(name, 0) for record in records[case])
        assert held == copies * parameter.numel(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collected_masters_are_the_model(case: Case, records: dict[Case, list[Record]]) -> None:
    """A plain model with the collected masters has the engine's losses; so again after they were changed in place."""
    for kind, losses in (("master", "as it is"), ("halved", "halved")):
        model = MemoryFormer(MODEL)
        model.load_state_dict(whole(records[case], kind))
        model.to(getattr(torch, case.precision))
        with torch.no_grad():
            expected = model(probe()[:, :-1], probe()[:, 1:])
        for record in records[case]:
            torch.testing.assert_close(record.probe_losses[losses], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", WARM, ids=str)
def test_state_made_in_advance_changes_nothing(case: Case, records: dict[Case, list[Record]]) -> None:
    cold = records[Case(case.tensor, case.data, case.stage, case.precision)]
    for record, other in zip(records[case], cold, strict=True):
        assert record.losses == other.losses[:3] and record.norms == other.norms[:3]


@pytest.mark.parametrize("index", [0, 1], ids=["P2", "P4"])
def test_cross_entropy_is_megatron_s(index: int, found: list[list[dict[str, Any]]]) -> None:
    for rank in range(4):
        loss_error, gradient_error = found[rank][0]["cross-entropy"][index]
        assert loss_error < 1e-5 and gradient_error < 1e-6


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_parameter_groups(kind: str) -> None:
    """Each parameter in one group; its decay and multiplier follow from its name."""
    model = MemoryFormer(ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=32))
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.3, table_learning_rate_multiplier=2.5))
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
