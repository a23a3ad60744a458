"""Each rank's own time a step: measured in real processes, compared, and said of a rank that is slow for long."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mf_train.parallel.collectives import collective, ledger
from mf_train.training.ranks import RankTimes, SlowRank, compare
from tests.distributed import run_distributed
from tests.training.runs import read_metrics, small_config, train, write_text

CPU = torch.device("cpu")
SLEEP = 0.2


def work(rank: int, world_size: int, ready: str) -> tuple[list[tuple[dict[str, Any], str]], list[float]]:
    """Seven steps, reports every second one; rank 1 works longer, and begins when the others already wait for it."""
    times, told, own = RankTimes(2, CPU), [], list[float]()
    for step in range(1, 8):
        dist.barrier()
        before = ledger.seconds()
        began = time.perf_counter()
        times.begin()
        if rank == 1:
            while len(list(Path(ready).glob(f"{step}-*"))) < world_size - 1:
                time.sleep(0.001)
            time.sleep(SLEEP)
        else:
            Path(ready, f"{step}-{rank}").touch()
        with collective("of a step", CPU):
            dist.all_reduce(torch.ones(1))
        told.append(times.end(step, data_wait=0.5 + rank))
        own.append(time.perf_counter() - began - (ledger.seconds() - before))
    return told, own


@pytest.mark.distributed
def test_the_rank_that_others_wait_for_is_named(tmp_path: Path) -> None:
    results = run_distributed(work, 3, str(tmp_path), init=True)
    told = results[0][0]
    assert all(other == told for other, _ in results)
    assert [bool(found) for found, _ in told] == [False, True, False, True, False, True, False]
    own = np.array([times for _, times in results])
    assert (own[1] > SLEEP).all()
    for found, span in ((told[1][0], slice(1, 2)), (told[3][0], slice(2, 4)), (told[5][0], slice(4, 6))):
        means = own[:, span].mean(1)  # with the report itself, of some milliseconds
        assert found["rank_seconds_most_rank"] == 1 and found["rank_seconds_most"] > SLEEP
        assert found["rank_seconds_least_rank"] in (0, 2)
        for name, rank in (("least", found["rank_seconds_least_rank"]), ("most", 1)):
            assert found[f"rank_seconds_{name}"] <= means[rank]
        assert found["rank_data_wait_most"] == 2.5 and found["rank_data_wait_most_rank"] == 2
        assert found["rank_data_wait_median"] == 1.5
    (line,) = [line for _, line in told if line]
    assert told[5][1] == line and line.startswith("step 6: rank 1 on ") and "for its data" in line


def test_compares_with_numpy_s_figures() -> None:
    dice = np.random.default_rng()
    for ranks in (2, 5, 8):
        seconds, waits = dice.random((2, ranks))
        found = compare(seconds.tolist(), waits.tolist())
        assert found["rank_seconds_least_rank"] == seconds.argmin()
        assert found["rank_seconds_most_rank"] == seconds.argmax()
        assert found["rank_data_wait_most_rank"] == waits.argmax()
        assert found["rank_seconds_median"] == np.quantile(seconds, 0.5, method="lower")
        assert (found["rank_seconds_least"], found["rank_seconds_most"]) == (seconds.min(), seconds.max())


def test_a_slow_rank_is_spoken_of_once_until_it_recovers() -> None:
    slow = SlowRank()

    def look(*seconds: float) -> int | None:
        return slow.look(compare(list(seconds), [0.0] * len(seconds)))

    reports = [(1, 2, 1), (1, 2, 1), (1, 1, 2), (1, 1, 2), (1, 1, 2), (1, 1, 2), (1, 1, 1.2), (1, 1, 2)]
    assert [look(*seconds) for seconds in reports] == [None, None, None, None, 2, None, None, None]
    assert [look(1, 1, 2) for _ in range(2)] == [None, 2]
    assert [look(1, 1) for _ in range(5)] == [None] * 5


def test_a_run_records_it_with_the_same_losses(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    train(tree, "training.steps=4", "logging.ranks_interval=2", "parallel.tensor=2", processes=2)
    metrics = read_metrics(tmp_path / "run")
    keys = set(compare([1.0, 2.0], [0.0, 0.0]))
    assert [keys <= set(entry) for entry in metrics] == [False, True, False, True]
    assert 0 < metrics[1]["rank_seconds_least"] <= metrics[1]["rank_seconds_most"]
    tree["training"]["output_dir"] = str(tmp_path / "alone")
    train(tree, "training.steps=4", "logging.ranks_interval=2")
    alone = read_metrics(tmp_path / "alone")
    assert [entry["loss"] for entry in alone] == [entry["loss"] for entry in metrics]
    assert not any(keys & set(entry) for entry in alone)
