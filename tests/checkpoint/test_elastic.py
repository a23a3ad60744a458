"""A run goes on from any checkpoint on any shape: P, R and ZeRO stage, weights and moments, as if never stopped.

Trainings of every shape that fits in 4 processes write a checkpoint; every shape reads those of all others. What is
read has to be bit for bit what was held, and the losses that follow those of one process that was never stopped
(`train_plainly`: torch's AdamW on the plain model). An engine goes on from one checkpoint after another: what a load
does not set shows, since it is left from the training before.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoint.elastic import (
    SAVED_STEP,
    Results,
    Resumed,
    World,
    checkpoint_of,
    run_world,
    whole_tensors,
)
from tests.distributed import run_distributed
from tests.parallel.test_engine import drift, largest_error, largest_relative
from tests.parallel.worlds import Case, Record, train_plainly
from tests.threads import threads
from tests.warm import free_port

pytestmark = pytest.mark.distributed

SHAPES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]  # P, R
STAGES = (0, 1, 2, 3)
FLOAT32 = [Case(*shape, stage, "float32") for shape in SHAPES for stage in STAGES]
BFLOAT16 = [replace(case, precision="bfloat16") for case in FLOAT32]

# moments and masters in fewer bytes, each on a shape and a stage; a split master needs bfloat16 and no stage 3
PLAIN = ("float32", "float32", "float32")
HELD = [
    *itertools.product(
        ("float32", "bfloat16", "int8"), ("float32", "bfloat16", "int8", "row"), ("float32", "split")
    )
]


def compact(index: int, shift: int = 0) -> Case:
    held = HELD[index % len(HELD)]
    split = held[2] == "split"
    stage = (index // 6 + shift) % (3 if split else 4)
    precision = "bfloat16" if split or index % 4 == 0 else "float32"
    shape = SHAPES[(index // 3 + shift) % len(SHAPES)]
    return Case(*shape, stage, precision, held=held, offload=(index // 3 + shift) % 2 == 0)


Pairs = dict[Case, list[Case]]  # by reader, whose checkpoints it reads


def of_each_shape(reader: Case, precision: str) -> list[Case]:
    """A writer of each shape, of stages in turn."""
    shift = reader.stage + SHAPES.index((reader.tensor, reader.data))
    return [Case(*shape, (shift + i // 2) % 4, precision) for i, shape in enumerate(SHAPES)]


def quick_writers(reader: Case) -> list[Case]:
    """Of its shape's four readers each has other shapes to read, of stages in turn: every pair of shapes once."""
    shift = reader.stage + SHAPES.index((reader.tensor, reader.data))
    writers = [Case(*shape, (reader.stage + i) % 4, "float32") for i, shape in enumerate(SHAPES)]
    return writers[shift % 4 :: 4]


FAST: Pairs = {reader: quick_writers(reader) for reader in FLOAT32}
FAST |= {
    Case(*shape, i % 4, "bfloat16"): [
        [Case(2, 2, 3, "bfloat16"), Case(1, 1, 1, "bfloat16")],
        [Case(4, 1, 2, "bfloat16"), Case(1, 2, 1, "float32")],
    ][i % 2]
    for i, shape in enumerate(SHAPES)
}
FAST[Case(1, 1, 0, "float32")].append(Case(2, 2, 3, "bfloat16"))
# each reads its own kinds, of another shape, and others: every pair of kinds of a moment, or of masters, once
FAST |= {compact(i, 1): [compact(i), compact(i + 3), compact(i + 15)] for i in range(0, len(HELD), 3)}
SLOW: Pairs = {reader: FLOAT32 for reader in FLOAT32}
SLOW |= {reader: of_each_shape(reader, "bfloat16") for reader in BFLOAT16}
SLOW |= {compact(i, 1): [compact(j) for j in range(len(HELD))] for i in range(len(HELD))}


def worlds_of(pairs: Pairs) -> list[World]:
    """One for each number of processes."""
    writers = sorted({source for sources in pairs.values() for source in sources})
    worlds = []
    for members in ([0, 1, 2, 3], [4, 5], [6]):
        write = [case for case in writers if case.tensor * case.data == len(members)]
        read = {case: pairs[case] for case in pairs if case.tensor * case.data == len(members)}
        worlds.append(World(members, free_port(), write, read))
    return worlds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@functools.cache
def results(folder: Path, slow: bool) -> list[Results]:
    """By rank."""
    place = folder / ("slow" if slow else "fast")
    worlds = worlds_of(SLOW if slow else FAST)
    return run_distributed(run_world, 7, place, worlds, 3 if slow else 2, timeout=1800 if slow else 500)


@pytest.fixture(scope="module")
def plain() -> dict[str, Record]:
    with threads(1):
        return {precision: train_plainly(precision, False) for precision in ("float32", "bfloat16")}


def readers(pairs: Pairs, slow: bool) -> list[object]:
    marks = [pytest.mark.slow] if slow else []
    return [pytest.param(reader, slow, id=f"{reader}{'-all' * slow}", marks=marks) for reader in pairs]


WRITERS = sorted({source for sources in FAST.values() for source in sources})


def test_the_matrix_is_whole() -> None:
    """Every pair of P in {1, 2, 4}, R in {1, 2, 4} and stages 0-3 in at most 4 processes."""
    degrees = itertools.product((1, 2, 4), (1, 2, 4), range(4))
    cases = {Case(p, r, stage, "float32") for p, r, stage in degrees if p * r <= 4}
    assert len(cases) == 24
    plain = {reader: sources for reader, sources in SLOW.items() if reader.held == PLAIN}
    float32 = {(w, r) for r, sources in plain.items() for w in sources if r.precision == "float32"}
    assert float32 == set(itertools.product(cases, cases))
    pairs = [(w, r) for r, sources in FAST.items() if r.held == PLAIN for w in sources]
    fast = [(w, r) for w, r in pairs if r.precision == w.precision == "float32"]
    assert len({(w.tensor, w.data, r.tensor, r.data) for w, r in fast}) == 6 * 6
    assert len({(w.stage, r.stage) for w, r in fast}) == 4 * 4
    assert len({w for w, _ in fast}) == len({r for _, r in fast}) == 24


def test_every_pair_of_kinds_is_there() -> None:
    """The quick run has every pair of a moment's kinds and of masters', the drills every pair of all three together."""
    for index, kinds in enumerate(zip(*HELD, strict=True)):
        pairs = {(w.held[index], r.held[index]) for r, sources in FAST.items() for w in sources}
        assert pairs == set(itertools.product(kinds, kinds))
    together = {(w.held, r.held) for r, sources in SLOW.items() for w in sources}
    assert together == set(itertools.product(HELD, HELD))
    readers = [case for case in FAST if case.held != PLAIN]
    assert {(case.tensor, case.data) for case in readers} == set(SHAPES)
    assert {case.stage for case in readers} == set(STAGES)


@pytest.mark.parametrize("writer", WRITERS, ids=str)
def test_what_is_written(writer: Case, folder: Path, plain: dict[str, Record]) -> None:
    """The files hold each rank's bits, and they are the masters and moments of one process to rounding."""
    found = results(folder, False)
    ranks = [rank[writer, None] for rank in found if (writer, None) in rank]
    assert ranks == [[]] * (writer.tensor * writer.data)
    if writer.precision == "bfloat16" or writer.held != PLAIN:
        return
    held = whole_tensors(checkpoint_of(writer, folder / "fast"), writer.tensor)
    # most of a key's bias adds the same to every score of a query: its gradient is rounding alone, which Adam follows
    for kind, expected in plain["float32"].state.items():
        for names, bound in (
            ([name for name in expected if not name.endswith("key.bias")], 2e-5),
            ([name for name in expected if name.endswith("key.bias")], 1e-3),
        ):
            error, name = largest_error({n: held[kind][n] for n in names}, {n: expected[n] for n in names})
            assert error < bound, (kind, name)


@pytest.mark.parametrize(("reader", "slow"), readers(FAST, False) + readers(SLOW, True))
def test_training_goes_on(reader: Case, slow: bool, folder: Path, plain: dict[str, Record]) -> None:
    """Float32: losses to 1e-5 of the uninterrupted run; bfloat16: as close as without a checkpoint."""
    found = results(folder, slow)
    worst_loss, worst_norm = 0.0, 0.0
    loss_bound, norm_bound = drift((plain["bfloat16"], plain["float32"]))
    for writer in (SLOW if slow else FAST)[reader]:
        ranks: list[Resumed] = [rank[reader, writer] for rank in found if (reader, writer) in rank]
        assert len(ranks) == reader.tensor * reader.data
        for record in ranks:
            assert record.wrong == [], writer
            assert record.steps == {float(SAVED_STEP)}, writer
            assert (record.losses, record.norms) == (ranks[0].losses, ranks[0].norms), writer
        expected = plain[reader.precision]
        steps = slice(SAVED_STEP, SAVED_STEP + len(ranks[0].losses))
        loss = largest_relative(ranks[0].losses, expected.losses[steps])
        norm = largest_relative(ranks[0].norms, expected.norms[steps])
        exact = reader.precision == writer.precision == "float32" and reader.held == writer.held == PLAIN
        assert loss < (1e-5 if exact else loss_bound), writer
        assert norm < (1e-4 if exact else norm_bound), writer
        worst_loss, worst_norm = max(worst_loss, loss), max(worst_norm, norm)
    print(f"{reader}: largest relative difference of losses {worst_loss:.1e}, of norms {worst_norm:.1e}")
