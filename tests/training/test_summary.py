"""The lines before the first step."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mf_train.config.loading import load_config
from mf_train.exit_status import DONE
from mf_train.parallel.processes import find_process
from mf_train.training.run import train as train_here
from tests.distributed import run_distributed
from tests.training.runs import complaints, read_metrics, small_config, train, write_config, write_text


def files_opened(rank: int, world_size: int, path: str) -> list[Path]:
    """By this rank of a run that goes on to its second step."""
    config = load_config(path, ["training.steps=2"])
    opened: list[Path] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | Path):
            opened.append(Path(arguments[0]))

    sys.addaudithook(note)
    assert train_here(config, find_process()) == DONE
    return opened


@pytest.mark.distributed
def test_rank_0_alone_reads_the_configuration_of_a_checkpoint(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["checkpoint"] = {"verify": False}  # else ranks share the reading of all files
    train(tree, "training.steps=1")
    first, second = run_distributed(files_opened, 2, write_config(tree))
    recorded = tmp_path / "run" / "checkpoints" / "step-000000001" / "config.yaml"
    assert recorded in first and recorded not in second
    assert recorded.parent / "manifest.json" in second  # it resumed too


def test_another_learning_rate_at_a_resume(tmp_path: Path) -> None:
    """Refused unless the run says how; a line to it goes on over restarts, whatever they say."""
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["optimizer"] = {"learning_rate": 0.008}
    tree["schedule"] = {"kind": "linear", "warmup_steps": 0, "minimum_fraction": 0.5}
    first = train(tree, "training.steps=2")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    tree["schedule"] = {"kind": "constant", "warmup_steps": 4}
    (line,) = complaints(train(tree, "training.steps=4", expect=2))
    # of 0.008 (1 - 0.5 s / 2) the end
    assert "the learning rate of step 3 would be 0.006, and it is 0.004 by the checkpoint's" in line
    assert "schedule.on_change to follow" in line and "rewarm" in line
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    rewarmed = train(tree, "training.steps=4", "schedule.on_change=rewarm")
    longer = train(tree, "training.steps=7")
    lower = ("optimizer.learning_rate=0.002", "schedule.on_change=follow")
    followed = train(tree, "training.steps=8", *lower, "optimizer.table_learning_rate_multiplier=2")
    rates = [entry["learning_rate"] for entry in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.006, 0.004, 0.005, 0.006, 0.007, 0.008, 0.008, 0.002], rel=1e-12)
    lines = [
        [line for line in run.stdout.splitlines() if "learning rate" in line or "multiplier" in line]
        for run in (first, rewarmed, longer, followed)
    ]
    since = "since it is not the checkpoint's (schedule.on_change: "
    assert lines == [
        [],
        [f"the learning rate goes from 0.004 at step 2 to 0.008 at step 6, {since}rewarm)"],
        [],
        [
            f"the learning rate jumps from 0.008 to 0.002 at step 8, {since}follow)",
            "warning: learning rate multipliers jump: tables from 1 to 2, ffn_tables from 1 to 2",
        ],
    ]
