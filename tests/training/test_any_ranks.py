"""A run on any number of data-parallel ranks up to its batch: the same batches, and losses that differ by rounding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from mf_train.run_folder import METRICS
from tests.training.runs import complaints, read_metrics, small_config, train, write_text

pytestmark = pytest.mark.distributed

RANKS = (1, 2, 3, 5, 7)  # of a batch of 8 sequences, from 8 streams
STEPS = 4
# each stage's run changes ranks at every step: what its first start has is what the last has not
RESTARTS = {0: (5, 1, 3, 7), 1: (7, 1, 3, 5), 2: (7, 5, 1, 3), 3: (2, 3, 5, 1)}


def configuration(folder: Path, stage: int, **training: Any) -> dict[str, Any]:
    tree = small_config(folder, write_text(folder.parent / "text.jsonl"))
    tree["parallel"] = {"zero_stage": stage}
    tree["training"] |= {"steps": STEPS, "validation_sequences": 0, **training}
    tree["data"] |= {"validation": [], "workers": 0}
    return tree


def followed(folder: Path) -> tuple[list[str], list[float]]:
    metrics = read_metrics(folder)
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    return [line["batch_digest"] for line in metrics], [line["loss"] for line in metrics]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[float]]:
    """The run of one rank."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(configuration(folder, 1))
    return followed(folder)


def assert_same(folder: Path, one: tuple[list[str], list[float]]) -> None:
    digests, losses = followed(folder)
    assert digests == one[0]
    assert losses == pytest.approx(one[1], rel=1e-5)


# each number and each stage; the drills have every pair
PAIRS = {(0, 5), (1, 7), (2, 3), (3, 2)}


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [
        pytest.param(*pair, marks=[] if pair in PAIRS else [pytest.mark.slow])
        for pair in itertools.product(range(4), RANKS[1:])
    ],
)
def test_any_number_of_ranks(
    stage: int, ranks: int, one: tuple[list[str], list[float]], tmp_path: Path
) -> None:
    """Micro-batches of one sequence: some ranks have one less than there are micro-batches."""
    folder = tmp_path / "run"
    train(configuration(folder, stage, micro_batch_size=1), processes=ranks)
    assert_same(folder, one)


@pytest.mark.parametrize("stage", [0, 1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_a_restart_may_change_their_number(
    stage: int, one: tuple[list[str], list[float]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for steps, ranks in enumerate(RESTARTS[stage], start=1):
        # a run that is stopped after each step, by its number of steps
        train(configuration(folder, stage, steps=steps, micro_batch_size=3), processes=ranks)
    assert_same(folder, one)


def test_tensor_and_data_parallel_ranks(one: tuple[list[str], list[float]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tree = configuration(folder, 1)
    tree["parallel"]["tensor"] = 2
    train(tree, processes=6)
    assert_same(folder, one)


def test_more_ranks_than_streams_and_than_sequences(
    one: tuple[list[str], list[float]], tmp_path: Path
) -> None:
    """Ranks without a stream get their sequences from others; ranks without a sequence are refused."""
    folder = tmp_path / "run"
    tree = configuration(folder, 1)
    tree["data"]["logical_streams"] = 2
    train(tree, processes=1)
    digests = [line["batch_digest"] for line in read_metrics(folder)]
    (folder / METRICS).unlink()
    tree["training"]["output_dir"] = str(tmp_path / "other")
    train(tree, processes=3)
    assert [line["batch_digest"] for line in read_metrics(tmp_path / "other")] == digests
    tree["training"]["output_dir"] = str(tmp_path / "none")
    tree["training"]["global_batch_size"] = 2
    done = train(tree, processes=3, expect=2)
    [line] = complaints(done)
    assert "training.global_batch_size 2" in line and "3 data-parallel ranks" in line
    assert not (tmp_path / "none").exists()
