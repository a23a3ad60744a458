"""AdamW over fragments against its equations in float64, whatever its moments and masters are held in."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mf_train.config import OptimizerConfig
from mf_train.kernels import cpu, cpu_adamw
from mf_train.kernels.adamw import Draw, Rates
from mf_train.parallel import adamw
from mf_train.parallel.adamw import AdamW, Updated
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.kinds import AVERAGE, KINDS
from mf_train.parallel.stored import Float32, Places, Split, Stored, copy_of, zeros

CPU = torch.device("cpu")
UNIT, UNITS, ALIGNMENT = 24, 32, 192
FIRST, SECOND, MASTERS = (
    ("float32", "bfloat16", "int8"),
    ("float32", "bfloat16", "int8", "row"),
    ("float32", "split"),
)
EVERY = [*itertools.product(FIRST, SECOND, MASTERS)]
COMPACT = [kinds for kinds in EVERY if kinds[:2] != ("float32", "float32")]  # those that kernels update
CONFIG = OptimizerConfig(betas=(0.8, 0.97), eps=1e-8)
RATE, DECAY, MULTIPLIER, AVERAGE_DECAY = 3e-2, 0.2, 0.5, 0.75


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
    numel, device = len(values), values.device
    if master == "split":
        halves = (torch.zeros(numel, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.int16))
        held: Stored = Split(tuple(halves), numel)
    else:
        held = Float32((torch.zeros(numel, device=device),), numel)
    held.write(values)
    moments = {
        name: zeros(kind, name, numel, UNIT, device)
        for name, kind in (("exp_avg", first), ("exp_avg_sq", second))
    }
    values_of = {"master": held, **moments, AVERAGE: copy_of(held)}
    return Fragment(0, numel, values_of, torch.zeros(numel, device=device))


def update(fragment: Fragment, step: int, seed: int = 0) -> None:
    places = Places("up.tables", UNIT, 8, 8, 0, 0)
    optimizer = AdamW(CONFIG, seed, ALIGNMENT, AVERAGE_DECAY)
    optimizer.update([Updated(fragment, DECAY, MULTIPLIER, places)], RATE, step)


def near(kind: str, exact: Tensor, largest: Tensor, moment: str) -> Tensor:
    """By how much what is held may differ from a number: two neighbours where rounding is at random."""
    size = exact.abs()
    if kind == "int8":
        most, power = (127, 2) if moment == "exp_avg" else (255, 4)
        root = (size / largest.clamp(min=1e-300)) ** (1 / power)
        return largest * ((root + 1.01 / most) ** power - root**power) + 1e-6 * size
    return size * {"float32": 3e-6, "bfloat16": 2.0**-7, "row": 3e-6, "split": 3e-6}[kind]


def check_steps(first: str, second: str, master: str, device: torch.device, steps: int = 4) -> None:
    """Each step is that of the equations, from what was held before it."""
    generator = torch.Generator().manual_seed(EVERY.index((first, second, master)))
    values = torch.randn(UNITS * UNIT, generator=generator).to(device)
    fragment = fragment_of(first, second, master, values)
    kinds = {"master": master, "exp_avg": first, "exp_avg_sq": second}
    assert fragment.gradient is not None
    for step in range(1, steps + 1):
        gradient = torch.randn(len(values), generator=generator) * 10 ** (
            torch.rand(len(values), generator=generator) * 2 - 2
        )
        gradient[: 2 * UNIT] = 0  # rows that are not read
        fragment.gradient.copy_(gradient)
        expected = Reference(*(fragment.held(kind).read().cpu().double() for kind in KINDS))
        expected.update(gradient.double(), step, by_row=second == "row")
        mean = fragment.held(AVERAGE).read().cpu().double()
        update(fragment, step)
        mean = AVERAGE_DECAY * mean + (1 - AVERAGE_DECAY) * fragment.held("master").read().cpu().double()
        torch.testing.assert_close(fragment.held(AVERAGE).read().cpu().double(), mean, rtol=1e-6, atol=1e-7)
        for kind, exact in vars(expected).items():
            read = fragment.held(kind).read().cpu().double()
            largest = exact.abs().view(-1, UNIT).amax(1, keepdim=True).expand(-1, UNIT).flatten()
            error = (read - exact).abs()
            # masters and first moments are differences of numbers up to 1
            bound = near(kinds[kind], exact, largest, kind) + (0 if kind == "exp_avg_sq" else 2e-7)
            assert bool((error <= bound).all()), (step, kind, error.max())


@pytest.mark.parametrize(("first", "second", "master"), EVERY)
def test_each_step_is_that_of_the_equations(
    first: str, second: str, master: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In torch operations; in pieces, of which the last is shorter."""
    monkeypatch.setitem(adamw.PIECE, "cpu", 2 * ALIGNMENT + 5)
    monkeypatch.setattr(adamw, "fast_adamw", lambda gradient: None)
    check_steps(first, second, master, CPU)


needs_cpp = pytest.mark.skipif(cpu.library() is None, reason=cpu.reason())


@needs_cpp
@pytest.mark.parametrize(("first", "second", "master"), COMPACT)
def test_each_step_in_cpp_is_that_of_the_equations(first: str, second: str, master: str) -> None:
    assert adamw.fast_adamw(torch.zeros(1)) is cpu_adamw
    check_steps(first, second, master, CPU)


def kernel_arguments(
    first: str, second: str, master: str, unit: int, units: int, seed: int = 0
) -> tuple[Tensor, Fragment, Rates, Draw]:
    """For units of a rank that has 2 of the 8 of a row, in the middle of a run; some numbers are far from others."""
    generator = torch.Generator().manual_seed(seed)
    numel = unit * units
    numbers = [torch.randn(numel, generator=generator) * 10 ** -(i % 3.0) for i in range(4)]
    fragment = fragment_of(first, second, master, numbers[0])
    for moment, values in zip(("exp_avg", "exp_avg_sq"), (numbers[1], numbers[2].square()), strict=True):
        held = zeros({"exp_avg": first, "exp_avg_sq": second}[moment], moment, numel, unit, CPU)
        held.write(values)
        fragment.values[moment] = held  # type: ignore[index]
    rates = Rates.of_step(RATE, DECAY, CONFIG.betas, CONFIG.eps, 7)
    return numbers[3], fragment, rates, Draw(0x9ABCDEF0, 0x12345678, 5, 2, 8, 4)


@needs_cpp
@pytest.mark.parametrize("unit", [1, 7, 64, 200])
@pytest.mark.parametrize(("first", "second", "master"), [COMPACT[-1], COMPACT[-3], COMPACT[9]])
def test_neither_threads_nor_parts_change_a_bit(first: str, second: str, master: str, unit: int) -> None:
    units = 2**17 // unit
    results = []
    for threads, cuts in ((1, (0, units)), (3, (0, units)), (2, (0, 1, units // 3, units))):
        gradient, fragment, rates, draw = kernel_arguments(first, second, master, unit, units)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for begin, end in itertools.pairwise(cuts):
            place = begin * unit, (end - begin) * unit
            held = [fragment.values[kind].narrow(*place).held for kind in KINDS]
            part = draw._replace(begin=draw.begin + begin)
            cpu_adamw.update(gradient.narrow(0, *place), unit, *held, rates, part)
        torch.set_num_threads(before)
        results.append([tensor for kind in KINDS for tensor in fragment.values[kind].tensors])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpp
def test_buffers_are_checked_before_cpp_gets_them() -> None:
    gradient, fragment, rates, draw = kernel_arguments("int8", "row", "split", 8, 4)
    held = [fragment.values[kind].held for kind in KINDS]
    for number, wrong in (
        (0, held[0]._replace(tensors=(held[0].tensors[0].half(), held[0].tensors[1]))),
        (1, held[1]._replace(tensors=(held[1].tensors[0][1:], held[1].tensors[1]))),
        (2, held[2]._replace(tensors=(held[2].tensors[0].repeat_interleave(2)[::2],))),
    ):
        with pytest.raises(ValueError, match=["master", "first", "second"][number]):
            cpu_adamw.update(gradient, 8, *held[:number], wrong, *held[number + 1 :], rates, draw)
    with pytest.raises(ValueError, match="30 numbers are not whole units of 8"):
        cpu_adamw.update(gradient[:30], 8, *held, rates, draw)


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
