"""Small studies for the tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from mf_train.study.cells import Cell, Grid, make_grid
from mf_train.study.study import Study, load_study
from tests.training.runs import run_command, small_config, write_text


def base_config(folder: Path) -> Path:
    """A configuration that trains in seconds, as a file."""
    tree = small_config(folder / "unused", write_text(folder / "text.jsonl"))
    del tree["training"]["output_dir"]
    tree["training"] |= {"steps": 4, "validation_interval": 2}
    path = folder / "base.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def study_file(folder: Path, axes: dict[str, Any], **other: Any) -> Path:
    """A study over `axes` in `folder`."""
    base = folder / "base.yaml"
    if not base.exists():
        base_config(folder)
    path = folder / "study.yaml"
    tree = {"base": str(base), "output_dir": str(folder / "out"), "axes": axes} | other
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def make_study(folder: Path, axes: dict[str, Any], **other: Any) -> tuple[Study, Grid]:
    """`study_file` as `memoryformer study` reads it."""
    study = load_study(study_file(folder, axes, **other))
    return study, make_grid(study)


def run_study(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`memoryformer study ARGUMENTS`."""
    return run_command(["study", *map(str, arguments)], cold=True)


def finish(cell: Cell, loss: float) -> None:
    """Leave what a cell of 4 steps does that ended with this loss."""
    write_metrics(cell.folder, {4: loss}, {4: loss})


def write_metrics(
    folder: Path, losses: dict[int, float], validation: dict[int, float], tokens: int = 256
) -> None:
    """A run's metrics.jsonl with these losses by step."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step, loss in losses.items():
            record = {"step": step, "tokens": step * tokens, "loss": loss, "step_seconds": 0.5}
            known = {"validation_loss": validation[step]} if step in validation else {}
            file.write(json.dumps(record | known) + "\n")
