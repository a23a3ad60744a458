"""One table of a study's cells: configuration, losses, cost and state, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mf_train.config.loading import config_to_tree
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.run_folder import read_metrics
from mf_train.study.cells import Cell, Grid
from mf_train.study.state import State, cell_state
from mf_train.study.study import Study

RESULTS = "results.csv"
AXIS = "axis."  # before the name of an axis in the table's head
# Columns beside the axes and the configuration's keys.
COLUMNS = (
    "cell", "state", "reason", "step", "steps", "final_validation_loss", "best_validation_loss", "best_step",
    "train_loss", "tokens", "flops", "bytes_moved", "parameters", "table_parameters", "block_parameters", "seconds",
    "tokens_per_second", "folder",
)  # fmt: skip
_LAST_STEPS = 20  # whose mean is the training loss that is reported


def collect(study: Study, grid: Grid) -> list[dict[str, Any]]:
    """A row for each cell of the grid, in its order."""
    return [collect_cell(cell, cell_state(cell)) for cell in grid.cells]


def collect_cell(cell: Cell, state: State) -> dict[str, Any]:
    """The row of one cell. Losses in nats a token, seconds of training steps without validation and saving."""
    records = read_metrics(cell.folder)
    validations = [(one["validation_loss"], one["step"]) for one in records if "validation_loss" in one]
    best, best_step = min(validations, default=(None, None))
    last = records[-_LAST_STEPS:]
    seconds = sum(one.get("step_seconds", 0.0) for one in records)
    tokens = records[-1].get("tokens", 0) if records else 0
    row: dict[str, Any] = {
        "cell": cell.number,
        "state": state.name,
        "reason": state.reason,
        "step": state.step,
        "steps": cell.config.training.steps,
        # of the last step: an earlier one says nothing about a run of this length
        "final_validation_loss": validations[-1][0]
        if validations and validations[-1][1] == state.step
        else None,
        "best_validation_loss": best,
        "best_step": best_step,
        "train_loss": sum(one["loss"] for one in last) / len(last) if last else None,
        "tokens": cell.cost.tokens,
        "flops": cell.cost.flops,
        "bytes_moved": cell.cost.bytes_moved,
        "parameters": cell.cost.parameters,
        "table_parameters": cell.cost.table_parameters,
        "block_parameters": cell.cost.block_parameters,
        "seconds": round(seconds, 3) if records else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "folder": str(cell.folder),
    }
    axes = {AXIS + name: label for name, label in cell.values.items()}
    return row | axes | flatten(config_to_tree(cell.config))


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration's tree with dotted keys; lists are text."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value) if isinstance(value, list) else value
    return found


def write_results(study: Study, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the table into the study's folder, as a whole. Raises OSError."""
    path = study.folder / RESULTS
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row)) or list(COLUMNS)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())
    return path


def read_results(path: Path) -> list[dict[str, str]]:
    """The rows of a table that `collect` wrote; all values are text. Raises UserError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; run memoryformer study collect first") from None
    if rows and (lacking := [name for name in COLUMNS if name not in rows[0]]):
        raise UserError(f"{path}: has no column {lacking[0]}; run memoryformer study collect again")
    return rows
