"""Small studies for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.training.runs import small_config, write_text


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
    path.write_text(
        yaml.safe_dump(
            {"base": str(base), "output_dir": str(folder / "out"), "axes": axes} | other, sort_keys=False
        )
    )
    return path


def write_metrics(
    folder: Path, losses: dict[int, float], validation: dict[int, float], tokens: int = 256
) -> None:
    """A run's metrics.jsonl with these losses by step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for step, loss in losses.items():
        record = {"step": step, "tokens": step * tokens, "loss": loss, "step_seconds": 0.5}
        if step in validation:
            record["validation_loss"] = validation[step]
        lines.append(json.dumps(record) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
