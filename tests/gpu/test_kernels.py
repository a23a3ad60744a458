"""The device's own kernels: the cases of tests/kernels/triton_*cases.py, and a layer of real size."""

from __future__ import annotations

import os
from importlib.metadata import version

import pytest
import torch
from torch import Tensor

from mf_train.kernels import count_codes, fast_loss, fast_norm, fast_rotary, hash_codes, lookup_all, reference
from mf_train.kernels.backends import find_backend
from mf_train.model.norm_steps import STEPS
from tests.gpu.device import device_or_skip, skip_without
from tests.kernels import norm_checks

DEVICE = device_or_skip()
skip_without("triton")
os.environ["TRITON_INTERPRET"] = (
    "1" if DEVICE == "cpu" else "0"
)  # for the whole run: triton reads it now and later
if DEVICE == "cpu" and version("triton").startswith("3.4."):

    @pytest.mark.skip(
        reason="triton 3.4's interpreter writes histograms 8 bytes wide; compiled kernels do not"
    )
    def test_triton_cases() -> None: ...

else:
    from tests.kernels.triton_adamw_cases import *  # noqa: F403
    from tests.kernels.triton_cases import *  # noqa: F403
    from tests.kernels.triton_loss_cases import *  # noqa: F403
    from tests.kernels.triton_rotary_cases import *  # noqa: F403

pytestmark = pytest.mark.usefixtures("settled_device")

TOKENS, TABLES, BITS, COLUMNS = 2048, 64, 8, (512, 256)
OUTPUTS = [f"{columns} columns" for columns in COLUMNS]
NAMES = ["codes", "weights", *OUTPUTS, "d x", *(f"d tables of {name}" for name in OUTPUTS)]
Results = dict[str, Tensor]


def layer_inputs(dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x [N, D], two sets of tables and the gradients of what they give, drawn on the CPU."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)

    x = normal(TOKENS, TABLES * BITS)
    tables = [normal(TABLES, 2**BITS, columns) for columns in COLUMNS]
    return x, tables, [normal(TOKENS, columns) for columns in COLUMNS]


def run_layer(x: Tensor, tables: list[Tensor], dys: list[Tensor]) -> Results:
    """Hash and lookups by what the device chooses, forward and backward through autograd."""
    leaves = [t.clone().requires_grad_() for t in (x, *tables)]
    codes, weights = hash_codes(leaves[0], TABLES)
    ys = lookup_all(codes, weights, leaves[1:], [None] * len(tables))
    gradients = torch.autograd.grad(ys, leaves, dys)
    results = [codes, weights.detach(), *(y.detach() for y in ys), *gradients]
    return dict(zip(NAMES, results, strict=True))


def true_layer(x: Tensor, tables: list[Tensor], dys: list[Tensor]) -> Results:
    """The same in float64 by the reference, a part of the tokens at a time."""
    leaves = [t.double().requires_grad_() for t in (x, *tables)]
    parts: list[list[Tensor]] = []
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in leaves]
    for begin in range(0, TOKENS, 256):
        rows = slice(begin, begin + 256)
        codes, weights = reference.hash_codes(leaves[0][rows], TABLES)
        ys = [reference.lookup(codes, weights, table) for table in leaves[1:]]
        for total, gradient in zip(
            sums, torch.autograd.grad(ys, leaves, [dy[rows].double() for dy in dys]), strict=True
        ):
            total += gradient
        parts.append([codes, weights.detach(), *(y.detach() for y in ys)])
    wholes = [torch.cat(part) for part in zip(*parts, strict=True)]
    return dict(zip(NAMES, [*wholes, *sums], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_device_chooses(dtype: torch.dtype) -> None:
    """The tests below mean little where torch operations stand in for the kernels."""
    x = torch.zeros(1, dtype=dtype, device=DEVICE)
    chosen = find_backend("auto", x).__name__.rpartition(".")[2]
    assert chosen in (("triton_backend",) if DEVICE == "cuda" else ("cpu", "composition"))
    steps = (fast_norm(x) or STEPS).__name__.rpartition(".")[2]
    assert steps in (("triton_norm",) if DEVICE == "cuda" else ("cpu_norm", "norm_steps"))
    if DEVICE == "cuda":
        assert fast_loss(x).__name__.endswith("triton_loss")
        assert fast_rotary(x).__name__.endswith("triton_rotary")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_real_size(dtype: torch.dtype) -> None:
    """Against float64, relative to the largest entry.

    Up to some hundred float32 terms are summed: 1e-5 allows each its rounding. bfloat16 rounds results once, by 2^-9,
    but d x is of weights and d weights that were rounded themselves.
    """
    inputs = layer_inputs(dtype)
    actual, expected = run_layer(*inputs), true_layer(*inputs)
    assert torch.equal(actual.pop("codes"), expected.pop("codes"))
    assert list(actual) == list(expected)
    for name, value in actual.items():
        assert value.dtype == dtype
        scale = expected[name].abs().max().item()
        error = (value.double() - expected[name]).abs().max().item()
        allowed = (1e-5 if dtype == torch.float32 else 1e-2) * scale
        assert error <= allowed, f"{name}: largest error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_repeat_to_the_bit(dtype: torch.dtype) -> None:
    """No sum of theirs is in an order that the device is free to choose: hash, lookup and every gradient."""
    inputs = layer_inputs(dtype)
    first = run_layer(*inputs)
    for _ in range(4):
        again = run_layer(*inputs)
        for name, value in first.items():
            different = int((again[name] != value).sum())
            assert torch.equal(again[name], value), f"{name}: {different} of {value.numel()} differ"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_slices_have_the_bits_of_the_whole(size: int, dtype: torch.dtype) -> None:
    """What P ranks do: each hashes its chunks of x and looks all codes up in its columns of the tables."""
    x, tables, _ = layer_inputs(dtype)
    codes, weights = hash_codes(x, TABLES)
    parts = [hash_codes(part, TABLES // size) for part in x.chunk(size, dim=-1)]
    for whole, pieces in ((codes, [c for c, _ in parts]), (weights, [w for _, w in parts])):
        assert torch.equal(torch.cat(pieces, dim=-1), whole)
    ys = lookup_all(codes, weights, tables, [None] * len(tables))
    for rank in range(size):
        mine = [table.chunk(size, dim=-1)[rank].contiguous() for table in tables]
        for y, part in zip(ys, lookup_all(codes, weights, mine, [None] * len(mine)), strict=True):
            different = int((part != y.chunk(size, dim=-1)[rank]).sum())
            assert different == 0, f"rank {rank}: {different} of {part.numel()} differ"


@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [512, 1280])
def test_a_norm_of_real_size(features: int, dtype: torch.dtype, centred: bool) -> None:
    """Against float64, again, and from slices of the features: every bit of the whole's results."""
    given = norm_checks.random_arguments(features, features, (5000,), dtype, centred, DEVICE)
    steps = fast_norm(given.x) or STEPS
    whole = norm_checks.run(steps, given)
    norm_checks.check_against_float64(whole, given)
    assert all(torch.equal(a, b) for a, b in zip(norm_checks.run(steps, given), whole, strict=True))
    for ranks in (2, 4, 8):
        norm_checks.check_ranks(steps, given, ranks, whole)


@pytest.mark.parametrize(("tau", "tables", "tokens"), [(4, 8, 33), (8, 24, 700), (10, 7, 3000), (16, 2, 90)])
def test_counts_of_codes(tau: int, tables: int, tokens: int) -> None:
    """What telemetry counts, also of the middle tables of a wider tensor: exact."""
    generator = torch.Generator().manual_seed(tau)
    wide = (2**tau * torch.rand(tokens, 3 * tables, generator=generator).pow(3)).int()
    codes = wide[:, tables : 2 * tables]
    counts = torch.zeros(tables, 2**tau, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        count_codes(wide.to(DEVICE)[:, tables : 2 * tables], counts)
    expected = 2 * torch.stack([torch.bincount(table, minlength=2**tau) for table in codes.T])
    assert torch.equal(counts.cpu(), expected)
