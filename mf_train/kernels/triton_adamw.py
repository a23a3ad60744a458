"""AdamW over compact numbers as one Triton kernel; see `mf_train.kernels.adamw`.

A program has a few whole units, in a tile [units, numbers of a unit]. What a unit becomes depends on the unit alone, so
neither ranks nor sizes change a bit.
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def,assignment"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw import Draw, Held, Rates

ELEMENTS = 1024  # of a tile
WARPS = 4


@triton.jit
def _mix(x):
    """lowbias32 of C. Wellons, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _read(ptr, rest_ptr, place, inside, unit, live, KIND: tl.constexpr, MOST: tl.constexpr):
    """The tile's numbers, float32."""
    held = tl.load(ptr + place, mask=inside, other=0)
    if KIND == "int8":
        k = held.to(tl.float32) * (1.0 / MOST)
        raised = k * tl.abs(k) if MOST == 127 else (k * k) * (k * k)
        return raised * tl.load(rest_ptr + unit, mask=live, other=0.0)[:, None]
    if KIND == "split":
        upper = held.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return (upper + tl.load(rest_ptr + place, mask=inside, other=0)).to(tl.float32, bitcast=True)
    return held.to(tl.float32)


@triton.jit
def _write(ptr, rest_ptr, place, inside, unit, live, values, random, KIND: tl.constexpr, MOST: tl.constexpr):
    """Hold the tile's numbers; of `random` the lower 16 bits count."""
    if KIND == "float32":
        tl.store(ptr + place, values, mask=inside)
    elif KIND == "bfloat16":
        carried = values.to(tl.uint32, bitcast=True) + (random & 0xFFFF)
        rounded = (carried >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        tl.store(ptr + place, rounded, mask=inside)
    elif KIND == "int8":
        size = tl.where(inside, tl.abs(values), 0.0)
        largest = tl.max(size, axis=1)
        tl.store(rest_ptr + unit, largest, mask=live)
        share = tl.div_rn(size, tl.maximum(largest, 1.17549435e-38)[:, None] + tl.zeros_like(size))
        root = tl.sqrt_rn(share) if MOST == 127 else tl.sqrt_rn(tl.sqrt_rn(share))
        k = tl.floor(root * MOST)
        most = tl.full(k.shape, MOST, tl.float32)
        below = tl.div_rn(k, most)
        above = tl.div_rn(k + 1, most)
        below *= below
        above *= above
        if MOST == 255:
            below *= below
            above *= above
        chance = tl.div_rn(share - below, above - below) * 65536
        k = tl.minimum(k + ((random & 0xFFFF).to(tl.float32) < chance).to(tl.float32), MOST)
        if MOST == 127:
            tl.store(ptr + place, tl.where(values < 0, -k, k).to(tl.int8), mask=inside)
        else:  # only 0 is held as 0
            tl.store(ptr + place, tl.maximum(k, (values > 0).to(tl.float32)).to(tl.uint8), mask=inside)
    else:  # split
        bits = values.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        weight = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, bits | 0x400000, nearest)  # a NaN stays one
        lacks = (bits - (weight & 0xFFFF0000)).to(tl.int32, bitcast=True)
        lacks = tl.minimum(tl.maximum(lacks, -32768), 32767)
        tl.store(ptr + place, (weight >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(rest_ptr + place, lacks.to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["num_units", "low", "high", "begin", "keep", "rate", "root_of_share"])
def _adamw_kernel(
    gradient_ptr,
    master_ptr,
    master_rest_ptr,
    first_ptr,
    first_rest_ptr,
    second_ptr,
    second_rest_ptr,
    num_units,
    low,
    high,
    begin,
    keep,
    rate,
    root_of_share,
    MINE: tl.constexpr,
    UNITS_OF_ROW: tl.constexpr,
    FIRST_OF_ROW: tl.constexpr,
    NEW_SHARE: tl.constexpr,
    BETA2: tl.constexpr,
    NEW_SQUARE: tl.constexpr,
    EPSILON: tl.constexpr,
    MASTER: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)
    live = unit < num_units
    column = tl.arange(0, BLOCK)
    place = unit[:, None] * UNIT + column[None, :]
    inside = live[:, None] & (column < UNIT)[None, :]
    own = begin + unit
    whole = own // MINE * UNITS_OF_ROW + own % MINE + FIRST_OF_ROW
    # int32 arguments whose bits are those of uint32
    key = _mix(_mix(whole.to(tl.uint32) + low.to(tl.uint32)) + high.to(tl.uint32))
    random = _mix(key[:, None] + (column.to(tl.uint32) * 0x9E3779B9)[None, :])

    gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0)
    average = _read(first_ptr, first_rest_ptr, place, inside, unit, live, FIRST, 127)
    average = average + (gradient - average) * NEW_SHARE
    if SECOND == "row":
        square = tl.load(second_ptr + unit, mask=live, other=0.0)
        square = square * BETA2 + tl.sum(gradient * gradient, axis=1) / UNIT * NEW_SQUARE
        tl.store(second_ptr + unit, square, mask=live)
        square = square[:, None] + tl.zeros_like(gradient)
    else:
        square = _read(second_ptr, second_rest_ptr, place, inside, unit, live, SECOND, 255)
        square = square * BETA2 + gradient * gradient * NEW_SQUARE
        _write(second_ptr, second_rest_ptr, place, inside, unit, live, square, random >> 16, SECOND, 255)
    root = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + root_of_share) + EPSILON
    master = _read(master_ptr, master_rest_ptr, place, inside, unit, live, MASTER, 127)
    master = master * keep - tl.div_rn(rate * average, root)
    _write(first_ptr, first_rest_ptr, place, inside, unit, live, average, random, FIRST, 127)
    _write(master_ptr, master_rest_ptr, place, inside, unit, live, master, random, MASTER, 127)


def update(
    gradient: Tensor, unit: int, master: Held, first: Held, second: Held, rates: Rates, draw: Draw
) -> None:
    """One step, in place; gradient float32 [N], N a multiple of `unit`."""
    units = gradient.numel() // unit
    if units == 0:
        return
    made = constants(unit, master.kind, first.kind, second.kind, rates, draw)
    tensors = [t for held in (master, first, second) for t in (*held.tensors, None)[:2]]
    with torch.cuda.device_of(gradient):
        _adamw_kernel[(triton.cdiv(units, made["UNITS"]),)](
            *(gradient, *tensors, units, *draw.signed_keys),
            *(draw.begin, rates.keep, rates.rate, rates.root_of_share),
            **made,
        )


def constants(unit: int, master: str, first: str, second: str, rates: Rates, draw: Draw) -> dict[str, Any]:
    """What is compiled in: what is the same in every step."""
    block = triton.next_power_of_2(unit)
    return {
        "MINE": draw.mine,
        "UNITS_OF_ROW": draw.units,
        "FIRST_OF_ROW": draw.first,
        "NEW_SHARE": rates.new_share,
        "BETA2": rates.beta2,
        "NEW_SQUARE": rates.new_square,
        "EPSILON": rates.epsilon,
        "MASTER": master,
        "FIRST": first,
        "SECOND": second,
        "UNIT": unit,
        "BLOCK": block,
        "UNITS": max(ELEMENTS // block, 1),
        "num_warps": WARPS,
        "enable_fp_fusion": False,
    }
