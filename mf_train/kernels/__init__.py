"""The memory layer's two steps, behind one choice of backend.

`hash_codes` turns features into codes and weights (elementwise, tiny); `lookup` sums weighted table rows (memory
traffic), `lookup_all` those of several table sets that share the codes. Backends: "cpu" (C++), "triton", "cuda" (the
shared-memory forward, built on request), "composition" (torch operations, every device), "reference" (float64,
for tests), and "auto", which takes the fastest that is there for the tensors' device and dtype.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops, reference
from .backends import (
    BACKENDS,
    choose_backend,
    describe,
    fast_adamw,
    fast_loss,
    fast_norm,
    fast_rotary,
    find_backend,
)
from .counting import count_codes
from .ops import GradientSum

__all__ = [
    "GradientSum",
    "choose_backend",
    "count_codes",
    "describe",
    "fast_adamw",
    "fast_loss",
    "fast_norm",
    "fast_rotary",
    "hash_codes",
    "lookup",
    "lookup_all",
    "lookup_int8",
]

SCORES = ("probability", "scaled_probability")
MAX_BITS = 16
CHUNKS = (1, 2, 4, 8)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The number of values from 0 up that each accepted type of code can hold.
CODE_CAPACITY = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31, torch.int64: 2**63}


def hash_codes(
    x: Tensor,
    num_tables: int,
    temperature: float = 1.0,
    score: str = "probability",
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cut x into K chunks of tau values; give each chunk's sign pattern and its probability (Eq. 2-4, 10).

    With z = x as [..., K, tau]: bit_i = (z_i >= 0), code = sum_i bit_i 2**i, and
    weight = prod_i sigmoid(2 |z_i| / temperature), which is what a softmax over all 2**tau sign patterns
    gives to the pattern of z. For `score="scaled_probability"` the weight is that times sum_i |z_i|.
    Codes carry no gradient; the weight's gradient takes sign(0) = +1, as the bit does, for -0.0 too.
    A NaN gives bit 0 and makes its chunk's weight NaN.

    Args:
        x: [..., D] float32, bfloat16, float16 or float64; any leading shape, empty included. D = K * tau,
            tau from 1 to 16.
        num_tables: K.
        temperature: t > 0.
        score: "probability" or "scaled_probability".
        backend: one of BACKENDS.

    Returns:
        codes [..., K], uint8 for tau <= 8, int16 for tau <= 15, int32 for 16; and weights [..., K] in x's
        dtype, computed in float32 (float64 for float64 x; always float64 in the reference), then rounded.

    Raises:
        ValueError: an argument of the wrong shape, type or range, named with its value.
    """
    _check_choice("backend", backend, BACKENDS)
    _check_choice("score", score, SCORES)
    _check_float("x", x)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if num_tables < 1:
        raise ValueError(f"num_tables must be at least 1, got {num_tables}")
    if x.dim() < 1 or x.shape[-1] % num_tables:
        raise ValueError(
            f"x's last dimension must be a multiple of num_tables = {num_tables}, "
            f"got x of shape {tuple(x.shape)}"
        )
    tau = x.shape[-1] // num_tables
    if not 1 <= tau <= MAX_BITS:
        raise ValueError(
            f"x has {x.shape[-1]} features for num_tables = {num_tables}, so {tau} bits a table; "
            f"1 to {MAX_BITS} are possible"
        )
    if backend == "reference":
        return reference.hash_codes(x, num_tables, temperature, score)
    weights, codes = ops.hash_codes(x, num_tables, float(temperature), score, backend)
    return codes, weights


def lookup(
    codes: Tensor,
    weights: Tensor,
    tables: Tensor,
    bias: Tensor | None = None,
    *,
    chunks: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Sum the rows that the codes name, weighted: y = sum_k weight_k * table_k[code_k] + bias (Eq. 11).

    Weights are rounded to the tables' dtype first. Outputs are summed over k, in order, rows' gradients over
    tokens, in order, and weights' gradients over columns: each in float32 (float64 for float64 tables) and
    rounded once, to the tables' dtype, weights' gradients to the weights'.
    On a GPU a row of more than a thousand readers is summed in segments of 512 of them, and then over segments.
    In float32, a slice of the tables' columns gives the same bits as those columns of the whole, and so do the
    gradients of tables and bias. The weights' gradient is the sum of `chunks` equal chunks of columns, added by
    neighbouring pairs: tables that are a half, a quarter or one of the chunks give with float32 weights a node of
    that tree. The backward pass gives the same bits in every run; for it codes, weights and the tables themselves
    are kept, no rows.

    Args:
        codes: [..., K] uint8, int16, int32 or int64, each in [0, 2**tau). On a CPU others are an error; on a GPU,
            where looking would wait for the device, the composition stops the process and the kernels give NaN.
        weights: [..., K] floating point; its dtype may differ from the tables'.
        tables: [K, 2**tau, O] float32, bfloat16, float16 or float64, tau from 1 to 16.
        bias: [O] of the tables' dtype, or None.
        chunks: 1, 2, 4 or 8, a divisor of O.
        backend: one of BACKENDS.

    Returns:
        y [..., O] in the tables' dtype.

    Raises:
        ValueError: arguments whose shapes, dtypes, devices or values do not fit together, named with their values.
    """
    return lookup_all(codes, weights, [tables], [bias], chunks=chunks, backend=backend)[0]


def lookup_all(
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    chunks: int = 1,
    backend: str = "auto",
) -> list[Tensor]:
    """`lookup` in each of several sets of tables that read the same codes, such as those of Q, K and V.

    All sets have the same K, tau, dtype and device; a chunk of the weights' gradient is the sum over that chunk of
    every set. Reads are sorted once for all sets. Arguments, results and errors otherwise as `lookup`'s, a list each.
    """
    biases = [None] * len(tables) if biases is None else biases
    _check_choice("backend", backend, BACKENDS)
    _check_float("weights", weights)
    if not tables or len(biases) != len(tables):
        raise ValueError(
            f"there must be one bias (or None) for each set of tables, got {len(biases)} and {len(tables)}"
        )
    for table, bias in zip(tables, biases, strict=True):
        _check_float("tables", table)
        _check_tables(codes, table)
        _check_sizes(codes, weights, table, bias)
        if chunks not in CHUNKS or table.shape[2] % chunks:
            raise ValueError(
                f"chunks must be one of {CHUNKS} and divide the {table.shape[2]} columns, got {chunks}"
            )
        if table.shape[:2] != tables[0].shape[:2] or table.dtype != tables[0].dtype:
            raise ValueError(
                "all sets of tables must have one K, 2**tau and dtype, "
                f"got {tuple(tables[0].shape)} {tables[0].dtype} and {tuple(table.shape)} {table.dtype}"
            )
    if backend == "reference":
        pairs = zip(tables, biases, strict=True)
        return [reference.lookup(codes, weights, table, bias) for table, bias in pairs]
    if all(bias is None for bias in biases):
        return ops.lookup(codes, weights, list(tables), [], chunks, backend)
    # a set without a bias beside sets with one: zeros stand for it
    full = [t.new_zeros(t.shape[2]) if b is None else b for t, b in zip(tables, biases, strict=True)]
    return ops.lookup(codes, weights, list(tables), full, chunks, backend)


def lookup_int8(
    codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`lookup` in tables of 8-bit integers with a scale a row, for inference.

    Where the weights' gradient will be asked for, torch operations run, which keep every row that was read; the tables
    have none.

    y = sum_k weight_k * scales_k[code_k] * tables_k[code_k] + bias, summed in float32 and rounded to weights' dtype.

    Args:
        codes: [..., K], as for `lookup`.
        weights: [..., K] floating point.
        tables: [K, 2**tau, O] int8.
        scales: [K, 2**tau] float32.
        bias: [O] of weights' dtype, or None.

    Returns:
        y [..., O] in weights' dtype.

    Raises:
        ValueError: as `lookup`.
    """
    _check_float("weights", weights)
    if tables.dtype != torch.int8:
        raise ValueError(f"tables must be int8, got {tables.dtype}")
    _check_tables(codes, tables)
    if scales.dtype != torch.float32 or scales.shape != tables.shape[:2]:
        raise ValueError(
            f"scales must be float32 [K, 2**tau] = {tuple(tables.shape[:2])}, "
            f"got {scales.dtype} {tuple(scales.shape)}"
        )
    _check_sizes(codes, weights, tables, bias, weights.dtype)
    differentiable = torch.is_grad_enabled() and (weights.requires_grad or scales.requires_grad)
    backend = find_backend("composition" if differentiable else "auto", weights)
    y: Tensor = backend.lookup_int8(codes, weights, tables, scales)
    return y if bias is None else y + bias


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_tables(codes: Tensor, tables: Tensor) -> None:
    """The tables' shape, and that codes have a type that can name all their rows."""
    if tables.dim() != 3 or tables.numel() == 0:
        raise ValueError(f"tables must be [K, 2**tau, O], none of them 0, got {tuple(tables.shape)}")
    rows = tables.shape[1]
    if rows not in [2**tau for tau in range(1, MAX_BITS + 1)]:
        raise ValueError(f"tables must have 2**tau rows, tau from 1 to {MAX_BITS}, got {tuple(tables.shape)}")
    if codes.dtype not in CODE_CAPACITY:
        raise ValueError(f"codes must be uint8, int16, int32 or int64, got {codes.dtype}")
    if rows > CODE_CAPACITY[codes.dtype]:
        raise ValueError(f"codes of {codes.dtype} cannot name {rows} rows of tables {tuple(tables.shape)}")


def _check_sizes(
    codes: Tensor, weights: Tensor, tables: Tensor, bias: Tensor | None, bias_dtype: torch.dtype | None = None
) -> None:
    """Codes, weights and bias fit a set of tables, and lie on its device."""
    if codes.dim() < 1 or codes.shape != weights.shape or codes.shape[-1] != tables.shape[0]:
        raise ValueError(
            "codes and weights must both be [..., K] for tables [K, 2**tau, O], "
            f"got codes {tuple(codes.shape)}, weights {tuple(weights.shape)}, tables {tuple(tables.shape)}"
        )
    wanted = bias_dtype or tables.dtype
    if bias is not None and (bias.shape != tables.shape[-1:] or bias.dtype != wanted):
        raise ValueError(
            f"bias must be [{tables.shape[-1]}] and {wanted}, got {tuple(bias.shape)} and {bias.dtype}"
        )
    for name, tensor in (("codes", codes), ("weights", weights), ("bias", bias)):
        if tensor is not None and tensor.device != tables.device:
            raise ValueError(f"{name} is on {tensor.device}, but tables is on {tables.device}")
