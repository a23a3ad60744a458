"""Orders are permutations that differ by epoch, source and seed; mixtures keep their shares."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mf_train.data.stream.digest import (
    LIMBS,
    batch_digest,
    format_digest,
    from_limbs,
    row_digest,
    rows_digest,
    to_limbs,
)
from mf_train.data.stream.order import EpochOrder, Mixture, WindowOrder
from tests.examples import examples


@examples(100)
@given(st.integers(0, 2**40), st.integers(0, 9), st.integers(1, 300), st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(seed: int, source: int, count: int, epoch: int) -> None:
    order = EpochOrder(seed=seed, source=source, size=count)
    assert sorted(order[epoch * count + i] for i in range(count)) == list(range(count))


def test_orders_differ() -> None:
    def order(seed: int, source: int, epoch: int) -> list[int]:
        documents = EpochOrder(seed=seed, source=source, size=1000)
        return [documents[epoch * 1000 + i] for i in range(1000)]

    orders = [order(*key) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (10, 0, 0), (1, 1, 0))]
    for index, one in enumerate(orders):
        for other in orders[:index]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 10  # 1 expected by chance
        # no trace of the files' order: neighbours and ranks are uncorrelated
        assert abs(np.corrcoef(one, np.arange(1000))[0, 1]) < 0.12
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.12


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_small_orders_are_even(count: int) -> None:
    """All permutations of a few documents come equally often over the epochs (chi-squared, 5 sigma)."""
    documents = EpochOrder(seed=3, source=0, size=count)
    epochs = 6000
    seen = Counter(tuple(documents[e * count + i] for i in range(count)) for e in range(epochs))
    possible = int(np.prod(np.arange(1, count + 1)))
    assert len(seen) == possible
    expected = epochs / possible
    chi_squared = sum((times - expected) ** 2 / expected for times in seen.values())
    assert chi_squared < (possible - 1) + 5 * np.sqrt(2 * (possible - 1))


def window_order(
    documents: int, streams: int, block: int = 64, window: int = 16, seed: int = 0
) -> WindowOrder:
    return WindowOrder(
        seed=seed,
        source=0,
        num_documents=documents,
        streams=streams,
        block_documents=block,
        window_blocks=window,
    )


@examples(100)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 8), st.integers(1, 5), st.integers(0, 9))
def test_windows_hold_every_document_equally_often(
    documents: int, streams: int, block: int, window: int, seed: int
) -> None:
    """After a number of epochs that all streams' windows divide, each document was read once an epoch."""
    order = window_order(documents, streams, block, window, seed)
    epochs = streams * order.window_blocks
    seen: Counter[int] = Counter()
    for stream in range(streams):
        for number in range(order.num_blocks):
            seen.update(order.window(stream, number))
    assert seen == dict.fromkeys(range(documents), epochs)


def test_a_window_is_blocks_of_neighbours_in_a_new_order() -> None:
    order = window_order(100_000, 4)
    assert (order.block_documents, order.window_blocks) == (64, 16)
    window = order.window(3, 7)
    assert len(set(window)) == len(window) == 1024
    blocks = {document // 64 for document in window}
    assert len(blocks) == 16 and sorted(window) == [b * 64 + i for b in sorted(blocks) for i in range(64)]
    assert np.diff(sorted(blocks)).max() > 10  # from all over the source
    assert abs(np.corrcoef(window[:-1], window[1:])[0, 1]) < 0.15  # blocks are interleaved
    assert sum(b - a == 1 for a, b in itertools.pairwise(window)) < 20
    others = [order.window(3, 8), order.window(2, 7), window_order(100_000, 4, seed=1).window(3, 7)]
    assert all(len(set(window) & set(other)) < 300 for other in others)


def test_small_sources_have_small_blocks() -> None:
    """A stream gets 16 blocks an epoch where it can, and no window is longer than its share of an epoch."""
    sizes = {n: window_order(n, 64) for n in (1, 7, 64, 242, 1024, 5000, 65_536, 10**9)}
    assert {n: order.block_documents for n, order in sizes.items()} == {
        **dict.fromkeys((1, 7, 64, 242, 1024), 1),
        5000: 4,
        65_536: 64,
        10**9: 64,
    }
    assert {n: order.window_blocks for n, order in sizes.items()} == {
        1: 1,
        7: 1,
        64: 1,
        242: 3,
        1024: 16,
        5000: 16,
        65_536: 16,
        10**9: 16,
    }


def test_golden_windows() -> None:
    """Changing these changes what every run trains on."""
    assert window_order(10, 2, block=2, window=3).window(1, 5) == GOLDEN_WINDOW
    assert window_order(10**9, 64).window(63, 10**6)[:5] == GOLDEN_HUGE_WINDOW


def test_order_of_a_huge_source() -> None:
    order = EpochOrder(seed=0, source=0, size=10**12 + 39)
    some = [order[i] for i in range(1000)]
    assert len(set(some)) == 1000 and max(some) < 10**12 + 39
    assert min(some) < 10**10 and max(some) > 99 * 10**10


def test_golden_orders() -> None:
    """Changing these changes what every run trains on."""
    order = EpochOrder(seed=7, source=2, size=10)
    assert [order[i] for i in range(30)] == GOLDEN_ORDER
    assert [EpochOrder(seed=0, source=0, size=10**9)[n] for n in (0, 1, 10**12)] == GOLDEN_HUGE


@examples(100)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(0, 63), st.integers(1, 300))
def test_mixture_keeps_its_shares(weights: list[float], start: int, rows: int) -> None:
    """In any window of the sequence, a source's count is within len(weights) of its exact share."""
    mixture = Mixture(weights)
    counts = mixture.starting_counts(start)
    assert sum(counts) == start
    taken = [0] * len(weights)
    for _ in range(rows):
        source = mixture.next_source([c + t for c, t in zip(counts, taken, strict=True)])
        taken[source] += 1
    total = sum(map(Fraction, weights))
    for count, weight in zip(taken, weights, strict=True):
        assert abs(count - rows * Fraction(weight) / total) <= len(weights)


def test_golden_mixture() -> None:
    mixture = Mixture([3, 1, 2])
    counts = [0, 0, 0]
    sequence = []
    for _ in range(12):
        sequence.append(mixture.next_source(counts))
        counts[sequence[-1]] += 1
    assert sequence == [0, 2, 0, 1, 2, 0] * 2


def test_digests_of_ranks_add_up() -> None:
    rows = np.random.default_rng(0).integers(0, 50000, (8, 17))
    whole = batch_digest(rows)
    for ranks in (1, 2, 4, 8):
        parts = [rows_digest(range(r, 8, ranks), rows[r::ranks]) for r in range(ranks)]
        total = np.array([to_limbs(part) for part in parts], np.float64).sum(0)
        assert format_digest(from_limbs(total)) == whole
    changed = rows.copy()
    changed[3, 5] += 1
    assert batch_digest(changed) != whole
    assert batch_digest(rows[::-1]) != whole  # the row's number counts
    assert batch_digest(rows.astype(np.int32)) == batch_digest(np.asfortranarray(rows)) == whole


@examples(100)
@given(st.integers(0, 2**64 - 1))
def test_limbs_are_exact(digest: int) -> None:
    assert from_limbs(to_limbs(digest)) == digest
    assert len(to_limbs(digest)) == LIMBS and max(to_limbs(digest)) < 2**16


def test_golden_digests() -> None:
    """Changing these makes the digests of earlier runs' metrics incomparable."""
    assert format_digest(row_digest(0, np.array([1, 2, 3]))) == GOLDEN_ROW
    assert batch_digest(np.arange(12).reshape(3, 4)) == GOLDEN_BATCH


GOLDEN_ORDER = [8, 7, 4, 9, 3, 5, 0, 6, 1, 2, 1, 7, 5, 2, 3, 0, 4, 6, 9, 8, 9, 4, 8, 0, 3, 7, 6, 1, 5, 2]
GOLDEN_HUGE = [364577734, 695723758, 139704610]
GOLDEN_ROW = "009e9b1eaa390c12"
GOLDEN_BATCH = "0b7e6babe965f64b"
GOLDEN_WINDOW = [3, 5, 1]
GOLDEN_HUGE_WINDOW = [100572385, 492502389, 412553302, 401540910, 44398083]
