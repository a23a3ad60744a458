"""Numbers of tables against plain Python's, and what a uniform code shows against an enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from mf_train.telemetry.statistics import BITS, HashStatistics, table_numbers
from mf_train.telemetry.uniform import uniform_code


def expected_numbers(reads: list[int], tau: int) -> list[float]:
    """From a table's codes, in the order of `table_numbers`; Gini as the mean absolute difference."""
    rows, total = 2**tau, len(reads)
    count = Counter(reads)
    each = [count[row] for row in range(rows)]
    entropy = -math.fsum(c / total * math.log2(c / total) for c in count.values()) / tau
    gini = sum(abs(a - b) for a, b in itertools.product(each, each)) / (2 * rows * total)
    ones = [sum(code >> bit & 1 for code in reads) / total - 0.5 for bit in range(tau)]
    return [total, len(count) / rows, entropy, gini, max(each) / total, *ones]


@pytest.mark.parametrize(("tau", "tokens"), [(1, 5), (3, 50), (6, 300), (8, 40)])
def test_numbers(tau: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tau)
    codes = (2**tau * torch.rand(tokens, 5, generator=generator) ** 3).long()
    codes[:, 4] = 1  # one row only
    counts = torch.stack([torch.bincount(table, minlength=2**tau) for table in codes.T])
    numbers = table_numbers(counts)
    for table in range(5):
        assert numbers[table].tolist() == pytest.approx(
            expected_numbers(codes[:, table].tolist(), tau), abs=1e-12
        )
    summary = HashStatistics("blocks.0.hash_ffn", numbers).summary()
    imbalance = numbers[:, BITS:].abs()
    assert summary["largest_share"] == 1.0
    assert summary["entropy"] == pytest.approx(numbers[:, 2].mean().item())
    assert summary["bit_imbalance_worst"] == pytest.approx(imbalance.max(1).values.mean().item())
    assert summary["bit_imbalances"] == pytest.approx(imbalance.mean(0).tolist(), abs=1e-4)


def test_tables_that_nobody_read_are_zeros() -> None:
    assert not table_numbers(torch.zeros(3, 16, dtype=torch.int64)).any()


@pytest.mark.parametrize(("reads", "rows"), [(1, 4), (3, 2), (6, 4), (4, 8)])
def test_a_uniform_code_enumerated(reads: int, rows: int) -> None:
    read = entropy = 0.0
    for codes in itertools.product(range(rows), repeat=reads):
        count = Counter(codes)
        read += len(count) / rows
        entropy -= math.fsum(c / reads * math.log(c / reads) for c in count.values()) / math.log(rows)
    found = uniform_code(reads, rows)
    assert found.rows_read == pytest.approx(read / rows**reads)
    assert found.entropy == pytest.approx(entropy / rows**reads)


@pytest.mark.parametrize(
    ("reads", "rows"), [(300, 2), (300, 256), (5000, 64), (200_000, 1024), (3 * 10**9, 65536)]
)
def test_a_uniform_code_drawn(reads: int, rows: int) -> None:
    found = uniform_code(reads, rows)
    assert 0 < found.rows_read <= 1 and 0 < found.entropy <= 1 + 1e-9
    if reads > 10**6:
        assert found.entropy == pytest.approx(1, abs=1e-4)
        assert found.largest_share == pytest.approx(1 / rows, rel=0.05)
        return
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(rows, (40, reads), generator=generator)
    numbers = table_numbers(torch.stack([torch.bincount(table, minlength=rows) for table in codes]))
    assert found.rows_read == pytest.approx(numbers[:, 1].mean().item(), rel=0.02)
    assert found.entropy == pytest.approx(numbers[:, 2].mean().item(), rel=0.01)
    assert found.largest_share == pytest.approx(numbers[:, 4].mean().item(), rel=0.06)
