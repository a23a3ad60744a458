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
from tests.training.runs import small_config, train, write_config, write_text


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


def test_a_learning_rate_that_jumps_at_a_resume_is_said(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["optimizer"] = {"learning_rate": 0.008}
    tree["schedule"] = {"kind": "linear", "warmup_steps": 0, "minimum_fraction": 0.5}
    first = train(tree, "training.steps=2")
    longer = train(tree, "training.steps=4")
    # 0.008 (1 - 0.5 * 3 / 4), and the end of the run of 2 steps
    assert (
        "warning: the learning rate of step 3 is 0.005; with the checkpoint's optimizer.learning_rate, schedule and "
        "training.steps it is 0.004\n"
    ) in longer.stdout
    tree["schedule"] = {"kind": "constant"}
    constant = train(tree, "training.steps=5"), train(tree, "training.steps=6")
    assert ["learning rate of step" in run.stdout for run in (first, *constant)] == [False, True, False]
