"""Counts of codes: every backend through the same closure, slices of codes, what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mf_train.kernels import count_codes, cpu
from mf_train.kernels.composition import code_dtype
from tests.threads import threads

FAST = [
    "auto",
    "composition",
    pytest.param("cpu", marks=pytest.mark.skipif(cpu.library() is None, reason=cpu.reason())),
]


def run_counting(count: Callable[[Tensor, Tensor], None], tau: int, tables: int, tokens: int) -> Tensor:
    """Counts of two calls: a batch of contiguous codes, and the middle tables of a wider tensor."""
    generator = torch.Generator().manual_seed(1000 * tau + tables + tokens)
    counts = torch.zeros(tables, 2**tau, dtype=torch.int64)
    codes = torch.randint(2**tau, (tokens, tables), generator=generator)
    codes[torch.rand(codes.shape, generator=generator) < 0.3] = 2**tau - 1
    count(codes.to(code_dtype(tau)), counts)
    wide = torch.randint(2**tau, (2, tokens, 3 * tables), generator=generator).to(code_dtype(tau))
    count(wide[..., tables : 2 * tables], counts)
    assert counts.sum() == 3 * tokens * tables
    return counts


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("tau", "tables", "tokens"), [(1, 1, 1), (4, 8, 33), (8, 24, 700), (10, 7, 300), (15, 3, 40), (16, 2, 90)]
)
def test_counts_are_the_references(backend: str, tau: int, tables: int, tokens: int) -> None:
    def fast(codes: Tensor, counts: Tensor) -> None:
        count_codes(codes, counts, backend=backend)

    def slow(codes: Tensor, counts: Tensor) -> None:
        count_codes(codes, counts, backend="reference")

    expected = run_counting(slow, tau, tables, tokens)
    for number in (1, 3):
        with threads(number):
            assert torch.equal(run_counting(fast, tau, tables, tokens), expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("bad", [16, -1])
def test_codes_out_of_range_are_refused(backend: str, bad: int) -> None:
    codes = torch.zeros(5, 3, dtype=torch.int32)
    codes[3, 1] = bad
    with pytest.raises(ValueError, match=rf"codes must be in \[0, 16\).*{bad}"):
        count_codes(codes, torch.zeros(3, 16, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("backend", FAST)
def test_no_codes_count_nothing(backend: str) -> None:
    counts = torch.ones(3, 16, dtype=torch.int64)
    count_codes(torch.zeros(0, 4, 3, dtype=torch.uint8), counts, backend=backend)
    assert counts.eq(1).all()


def test_arguments_that_do_not_fit_are_named() -> None:
    codes = torch.zeros(5, 3, dtype=torch.uint8)
    for counts in (
        torch.zeros(3, 16),
        torch.zeros(4, 16, dtype=torch.int64),
        torch.zeros(3, 12, dtype=torch.int64),
        torch.zeros(16, 3, dtype=torch.int64).t(),
    ):
        with pytest.raises(ValueError, match="int64"):
            count_codes(codes, counts)
    with pytest.raises(ValueError, match="backend must be one of"):
        count_codes(codes, torch.zeros(3, 16, dtype=torch.int64), backend="fast")
