"""Numbers held in fewer bytes: how near, how fair on average, and the same for every split over ranks."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mf_train.parallel.kinds import MOMENTS, held_bytes
from mf_train.parallel.stored import Places, Split, zeros

CPU = torch.device("cpu")
HELD = [(moment, kind) for moment in MOMENTS for kind in ("float32", "bfloat16", "int8")]
HELD += [("exp_avg_sq", "row")]
ROUNDED = [(moment, kind) for moment in MOMENTS for kind in ("bfloat16", "int8")]
BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "row": 0.0}


def numbers(moment: str, units: int, unit: int, seed: int = 0) -> Tensor:
    """Of many sizes in a unit, some zero; one unit is zero altogether. Second moments are not negative."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(units, unit, generator=generator) * 10 ** (
        torch.rand(units, unit, generator=generator) * 5 - 8
    )
    values[torch.rand(units, unit, generator=generator) < 0.05] = 0
    values[units // 2] = 0
    return (values if moment == "exp_avg" else values.square()).flatten()


def bits(seed: int, step: int, numel: int, unit: int) -> Tensor:
    return Places("tables", unit, 1, 1, 0, 0).bits(seed, step, 0, numel, CPU)


@pytest.mark.parametrize(("moment", "kind"), HELD)
@pytest.mark.parametrize("unit", [24, 64])
def test_what_is_held_is_near_and_is_held_again_to_the_last_bit(moment: str, kind: str, unit: int) -> None:
    values = numbers(moment, 50, unit)
    held = zeros(kind, moment, values.numel(), unit, CPU)
    assert held.read().count_nonzero() == 0
    scales = 4 / unit if kind in ("int8", "row") else 0
    assert held.nbytes == (BYTES[kind] + scales) * values.numel() == held_bytes(kind, unit) * values.numel()
    held.write(values)
    read = held.read().clone()
    assert read.dtype == torch.float32
    by_unit, original = read.view(-1, unit).double(), values.view(-1, unit).double()
    if kind == "float32":
        assert torch.equal(read, values)
    elif kind == "bfloat16":
        assert torch.equal(read, values.bfloat16().float())
    elif kind == "row":
        torch.testing.assert_close(by_unit[:, 0], original.mean(1), rtol=1e-6, atol=0)
        assert torch.equal(by_unit, by_unit[:, :1].expand_as(by_unit))
    else:
        most, power = (127, 2) if moment == "exp_avg" else (255, 4)
        largest = original.abs().amax(1, keepdim=True)
        # half a step of the root, and where a number would be held as 0, the smallest code
        root = (original.abs() / largest.clamp(min=1e-300)) ** (1 / power)
        near = (root + 0.501 / most) ** power - root**power
        bound = largest * near.clamp(min=1.001 * most**-power if moment == "exp_avg_sq" else 0)
        assert bool(((by_unit - original).abs() <= bound + 1e-30).all())
        if moment == "exp_avg_sq":
            assert bool(((by_unit > 0) == (original > 0)).all()), "an update divides by its root"
        assert bool((by_unit.sign() * original.sign() >= 0).all())
    tensors = [tensor.clone() for tensor in held.tensors]
    held.write(held.read().clone())
    assert all(torch.equal(one, other) for one, other in zip(tensors, held.tensors, strict=True))


@pytest.mark.parametrize(("moment", "kind"), ROUNDED)
def test_rounding_at_random_is_right_on_average(moment: str, kind: str) -> None:
    """The mean of 4,000 roundings is within what their spread allows, six standard errors."""
    unit, draws = 8, 4000
    values = numbers(moment, 8, unit, seed=3)
    held = zeros(kind, moment, values.numel(), unit, CPU)
    total, squares = (torch.zeros(values.numel(), dtype=torch.float64) for _ in range(2))
    for step in range(draws):
        held.write(values, bits(7, step, values.numel(), unit))
        read = held.read().double()
        total += read
        squares += (read - values).square()
    mean = total / draws
    spread = (squares / draws).sqrt()
    if kind == "int8":
        # of a second moment only 0 is held as 0: the smallest code stands for what is below it too
        largest = values.view(-1, unit).abs().amax(1, keepdim=True).expand(-1, unit).flatten()
        kept = values.abs() >= largest * (255.0**-4 if moment == "exp_avg_sq" else 0)
    else:
        kept = torch.ones_like(values, dtype=torch.bool)
    error = (mean - values).abs()
    # 2^-16: the finest chance
    bound = 6 * spread / math.sqrt(draws) + 2.0**-16 * spread + 1e-6 * values.abs()
    assert bool((error <= bound + spread * 2.0**-6)[kept].all())
    assert bool((spread[kept] > 0).any())


def test_nearest_bfloat16_is_one_of_the_two_neighbours() -> None:
    values = numbers("exp_avg", 100, 8, seed=5)
    held = zeros("bfloat16", "exp_avg", values.numel(), 8, CPU)
    for step in range(20):
        held.write(values, bits(1, step, values.numel(), 8))
        read = held.read()
        towards_zero = (values.view(torch.int32) & -0x10000).view(torch.float32)
        away = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
        assert bool(((read == towards_zero) | (read == away)).all())


@pytest.mark.parametrize(("moment", "kind"), [each for each in HELD if each[1] != "float32"])
def test_a_view_is_of_whole_units(moment: str, kind: str) -> None:
    unit = 16
    values = numbers(moment, 10, unit)
    held = zeros(kind, moment, values.numel(), unit, CPU)
    held.write(values)
    part = held.narrow(3 * unit, 4 * unit)
    assert torch.equal(part.read(), held.read()[3 * unit : 7 * unit])
    part.write(torch.zeros(4 * unit))
    assert held.read()[3 * unit : 7 * unit].count_nonzero() == 0
    assert held.read()[: 3 * unit].count_nonzero() > 0
    places = [*held.pieces(3 * unit + 1)]
    assert places == [(0, 48), (48, 48), (96, 48), (144, 16)]


def test_a_number_is_its_weight_and_16_bits() -> None:
    """Of any bits: equal numbers but where two weights are equally near, and there the last bit at most."""
    generator = torch.Generator().manual_seed(11)
    pattern = torch.randint(-(2**31), 2**31, (2**18,), generator=generator, dtype=torch.int64)
    ties = (pattern[:2000] & ~0xFFFF) | 0x8000
    values = torch.cat((pattern, ties)).to(torch.int32).view(torch.float32)
    values = values[values.isfinite() & (values.abs() < 3e38)]
    values = torch.cat((values, torch.tensor([0.0, -0.0, 1.0, math.inf, -math.inf, 1e-45])))
    held = Split(
        (torch.zeros(len(values), dtype=torch.bfloat16), torch.zeros(len(values), dtype=torch.int16)),
        len(values),
    )
    held.write(values)
    assert torch.equal(held.tensors[0], values.bfloat16())
    read = held.read().view(torch.int32)
    expected = values.view(torch.int32)
    tie = (expected & 0x1FFFF) == 0x8000  # and the lower neighbour is the even one
    assert int(tie.sum()) > 900
    assert torch.equal(read[~tie], expected[~tie])
    assert torch.equal(read[tie], expected[tie] - 1)
    again = held.read().clone()
    held.write(again)
    assert torch.equal(held.read().view(torch.int32), again.view(torch.int32))
    assert held.nbytes == 4 * len(values) == (held_bytes("bfloat16") + held_bytes("split")) * len(values)


def test_not_a_number_stays_one() -> None:
    held = Split((torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int16)), 2)
    held.write(torch.tensor([math.nan, -math.nan]))
    assert bool(held.read().isnan().all())


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_random_bits_are_those_of_the_place_in_the_whole(ranks: int) -> None:
    """Of a table [K, rows, columns] that tensor parallelism splits by columns, and of any part of a rank's slice."""
    tables, rows, unit, chunks = 3, 5, 8, 4
    whole = Places("up.tables", unit, chunks, chunks, 0, 0).bits(5, 17, 0, tables * rows * chunks * unit, CPU)
    mine = chunks // ranks
    for rank in range(ranks):
        expected = whole.view(tables, rows, ranks, mine * unit)[:, :, rank].flatten()
        for start, stop in itertools.pairwise((0, 1, 7, 12, tables * rows * mine)):
            places = Places("up.tables", unit, chunks, mine, rank * mine, start)
            for first, last in itertools.pairwise((0, (stop - start) // 2, stop - start)):
                found = places.bits(5, 17, first * unit, (last - first) * unit, CPU)
                assert torch.equal(found, expected[(start + first) * unit : (start + last) * unit])


def test_random_bits_look_random() -> None:
    """Each bit is set half the time, and neighbours, moments, steps, seeds and names do not go together."""
    places = Places("up.tables", 64, 8, 8, 0, 0)
    numel = 2**18
    drawn = {
        "plain": places.bits(0, 0, 0, numel, CPU),
        "step": places.bits(0, 1, 0, numel, CPU),
        "seed": places.bits(1, 0, 0, numel, CPU),
        "name": replace(places, name="down.tables").bits(0, 0, 0, numel, CPU),
    }
    drawn["moment"] = drawn["plain"] >> 16
    drawn["neighbour"] = drawn["plain"].roll(1)
    drawn["row"] = drawn["plain"].roll(64)
    bound = 6 / math.sqrt(numel)
    for bit in range(16):
        signs = {name: ((value >> bit) & 1).double() * 2 - 1 for name, value in drawn.items()}
        assert all(abs(value.mean().item()) < bound for value in signs.values())
        for name, value in signs.items():
            assert name == "plain" or abs((signs["plain"] * value).mean().item()) < bound, (bit, name)
