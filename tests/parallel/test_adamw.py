"""AdamW over fragments against its equations in float64, whatever its moments and masters are held in."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mf_train.config import OptimizerConfig
from mf_train.parallel import adamw
from mf_train.parallel.adamw import AdamW, Updated
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.kinds import KINDS
from mf_train.parallel.stored import Float32, Places, Split, Stored, zeros

CPU = torch.device("cpu")
UNIT, UNITS, ALIGNMENT = 24, 32, 192
FIRST, SECOND, MASTERS = (
    ("float32", "bfloat16", "int8"),
    ("float32", "bfloat16", "int8", "row"),
    ("float32", "split"),
)
EVERY = [*itertools.product(FIRST, SECOND, MASTERS)]
CONFIG = OptimizerConfig(betas=(0.8, 0.97), eps=1e-8)
RATE, DECAY, MULTIPLIER = 3e-2, 0.2, 0.5


@dataclass
class Reference:
    """Eq. of AdamW (arXiv 1711.05101, algorithm 2) in float64, from the state that was held."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor

    def update(self, gradient: Tensor, step: int, *, by_row: bool) -> None:
        (beta1, beta2), rate = CONFIG.betas, RATE * MULTIPLIER
        square = gradient.square()
        if by_row:
            square = square.view(-1, UNIT).mean(1, keepdim=True).expand(-1, UNIT).flatten()
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * gradient
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * square
        mean = self.exp_avg / (1 - beta1**step)
        root = (self.exp_avg_sq / (1 - beta2**step)).sqrt()
        self.master = self.master * (1 - rate * DECAY) - rate * mean / (root + CONFIG.eps)


def fragment_of(first: str, second: str, master: str, values: Tensor) -> Fragment:
    numel = len(values)
    if master == "split":
        tensors = (torch.zeros(numel, dtype=torch.bfloat16), torch.zeros(numel, dtype=torch.int16))
        held: Stored = Split(tensors, numel)
    else:
        held = Float32((torch.zeros(numel),), numel)
    held.write(values)
    moments = {
        name: zeros(kind, name, numel, UNIT, CPU)
        for name, kind in (("exp_avg", first), ("exp_avg_sq", second))
    }
    return Fragment(0, numel, {"master": held, **moments}, torch.zeros(numel))


def update(fragment: Fragment, step: int, seed: int = 0) -> None:
    places = Places("up.tables", UNIT, 8, 8, 0, 0)
    AdamW(CONFIG, seed, ALIGNMENT).update([Updated(fragment, DECAY, MULTIPLIER, places)], RATE, step)


def near(kind: str, exact: Tensor, largest: Tensor, moment: str) -> Tensor:
    """By how much what is held may differ from a number: two neighbours where rounding is at random."""
    size = exact.abs()
    if kind == "int8":
        most, power = (127, 2) if moment == "exp_avg" else (255, 4)
        root = (size / largest.clamp(min=1e-300)) ** (1 / power)
        return largest * ((root + 1.01 / most) ** power - root**power) + 1e-6 * size
    return size * {"float32": 3e-6, "bfloat16": 2.0**-7, "row": 3e-6, "split": 3e-6}[kind]


@pytest.mark.parametrize(("first", "second", "master"), EVERY)
def test_each_step_is_that_of_the_equations(
    first: str, second: str, master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what was held before it; in pieces, of which the last is shorter."""
    monkeypatch.setitem(adamw.PIECE, "cpu", 2 * ALIGNMENT + 5)
    generator = torch.Generator().manual_seed(EVERY.index((first, second, master)))
    values = torch.randn(UNITS * UNIT, generator=generator)
    fragment = fragment_of(first, second, master, values)
    kinds = {"master": master, "exp_avg": first, "exp_avg_sq": second}
    assert fragment.gradient is not None
    for step in range(1, 5):
        gradient = torch.randn(len(values), generator=generator) * 10 ** (
            torch.rand(len(values), generator=generator) * 2 - 2
        )
        gradient[: 2 * UNIT] = 0  # rows that are not read
        fragment.gradient.copy_(gradient)
        expected = Reference(*(fragment.held(kind).read().double() for kind in KINDS))
        expected.update(gradient.double(), step, by_row=second == "row")
        update(fragment, step)
        for kind, exact in vars(expected).items():
            read = fragment.held(kind).read().double()
            largest = exact.abs().view(-1, UNIT).amax(1, keepdim=True).expand(-1, UNIT).flatten()
            error = (read - exact).abs()
            # masters and first moments are differences of numbers up to 1
            bound = near(kinds[kind], exact, largest, kind) + (0 if kind == "exp_avg_sq" else 2e-7)
            assert bool((error <= bound).all()), (step, kind, error.max())


@pytest.mark.parametrize("master", MASTERS)
def test_float32_moments_are_torchs_to_the_last_bit(master: str) -> None:
    """Also in pieces; a split master but for the last bit of one in 2^17."""
    generator = torch.Generator().manual_seed(2)
    fragment = fragment_of("float32", "float32", master, torch.randn(UNITS * UNIT, generator=generator))
    assert fragment.gradient is not None
    theirs = fragment.held("master").read().clone().requires_grad_()
    torchs = torch.optim.AdamW(
        [theirs], lr=RATE * MULTIPLIER, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=DECAY, fused=True
    )
    for step in range(1, 6):
        theirs.grad = torch.randn(len(theirs), generator=generator)
        fragment.gradient.copy_(theirs.grad)
        torchs.step()
        update(fragment, step)
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(fragment.held(kind).read(), torchs.state[theirs][kind])
        difference = fragment.held("master").read().view(torch.int32) - theirs.detach().view(torch.int32)
        assert int(difference.abs().max()) <= (master == "split")
        theirs.data.copy_(fragment.held("master").read())


def test_random_bits_follow_the_seed_and_the_step() -> None:
    values, gradient = torch.zeros(UNITS * UNIT), torch.linspace(-1, 1, UNITS * UNIT)
    found = {}
    for seed, step in itertools.product((0, 0, 1), (1, 9)):
        fragment = fragment_of("bfloat16", "int8", "float32", values)
        assert fragment.gradient is not None
        fragment.gradient.copy_(gradient)
        update(fragment, step, seed)
        held = torch.cat([fragment.held(kind).read() for kind in ("exp_avg", "exp_avg_sq")])
        assert torch.equal(found.setdefault((seed, step), held), held)
    for one, other in itertools.combinations(found.values(), 2):
        assert not torch.equal(one, other)


def test_small_changes_of_a_bfloat16_moment_are_not_lost() -> None:
    """Beta2 = 0.999: a step's share is less than half of a last place, so that rounding to nearest would never move."""
    config = OptimizerConfig(betas=(0.9, 0.999))
    fragment = fragment_of("float32", "bfloat16", "float32", torch.zeros(UNITS * UNIT))
    assert fragment.gradient is not None
    fragment.held("exp_avg_sq").write(torch.ones(UNITS * UNIT))
    optimizer = AdamW(config, 0, ALIGNMENT)
    updated = Updated(fragment, 0.0, 1.0, Places("t", UNIT, 8, 8, 0, 0))
    for step in range(1, 501):
        fragment.gradient.fill_(2.0)
        optimizer.update([updated], 1e-3, step)
    expected = 4 - 3 * 0.999**500
    # each step rounds by less than 2^-7 of the value
    assert abs(fragment.held("exp_avg_sq").read().mean().item() - expected) < 6 * math.sqrt(500 / 768) * 0.03
