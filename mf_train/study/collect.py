"""One table of a study's cells: configuration, losses, cost and state, as CSV."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mf_train.config.loading import config_to_tree
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.run_folder import read_metrics
from mf_train.study.cells import Cell, Cost, Grid
from mf_train.study.state import DONE, State, cell_state

if TYPE_CHECKING:
    from pandas import DataFrame  # imported by functions: it takes half a second

RESULTS = "results.csv"
AXIS = "axis."  # before the name of an axis in the table's head
LOSS = "final_validation_loss"
# Columns beside the axes and the configuration's keys.
COLUMNS = (
    "cell", "state", "reason", "step", "steps", "final_validation_loss", "best_validation_loss", "best_step",
    "train_loss", "tokens", "flops", "bytes_moved", "parameters", "table_parameters", "block_parameters", "seconds",
    "tokens_per_second", "folder",
)  # fmt: skip
_COSTS = tuple(field.name for field in fields(Cost))
_LAST_STEPS = 20  # whose mean is the training loss that is reported


def collect(grid: Grid) -> DataFrame:
    """A row for each cell of the grid, in its order; None where a cell has no such value."""
    from pandas import DataFrame

    rows = [_row(cell, cell_state(cell)) for cell in grid.cells]
    return DataFrame(rows, columns=None if rows else COLUMNS, dtype=object)


def _row(cell: Cell, state: State) -> dict[str, Any]:
    """The row of one cell. Losses in nats a token, seconds of training steps without validation and saving."""
    from pandas import json_normalize

    records = read_metrics(cell.folder)
    validations = [(one["validation_loss"], one["step"]) for one in records if "validation_loss" in one]
    best, best_step = min(validations, default=(None, None))
    last_loss, last_step = validations[-1] if validations else (None, None)
    losses = [one["loss"] for one in records[-_LAST_STEPS:] if "skipped" not in one]
    seconds = sum(one.get("step_seconds", 0.0) for one in records)
    tokens = records[-1].get("tokens", 0) if records else 0
    row: dict[str, Any] = {
        "cell": cell.number,
        "state": state.name,
        "reason": state.reason,
        "step": state.step,
        "steps": cell.config.training.steps,
        # of the last step: an earlier one says nothing about a run of this length
        "final_validation_loss": last_loss if last_step == state.step else None,
        "best_validation_loss": best,
        "best_step": best_step,
        "train_loss": sum(losses) / len(losses) if losses else None,
        **asdict(cell.cost),
        "seconds": round(seconds, 3) if records else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "folder": str(cell.folder),
    }
    axes = {AXIS + name: label for name, label in cell.values.items()}
    settings: dict[str, Any] = json_normalize(config_to_tree(cell.config)).to_dict("records")[0]
    return row | axes | settings


def write_results(folder: Path, rows: DataFrame) -> Path:
    """Write the table into the study's folder, as a whole. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    # as text: pandas would write a loss of nan as if there were none
    text = rows.map(lambda value: "" if value is None else str(value))
    write_whole(folder / RESULTS, text.to_csv(index=False, lineterminator="\n").encode())
    return folder / RESULTS


def read_results(path: Path) -> DataFrame:
    """The rows of a table that `collect` wrote; all values are text.

    Raises UserError, also where a done cell has a cost that is no finite number, or a loss that is no number: a table
    that was edited. A loss may be missing, or not finite.
    """
    from pandas import read_csv

    try:
        rows = read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"{path}: is not there; run memoryformer study collect first") from None
    except ValueError as error:
        raise UserError(f"{path}: is no table ({error}); run memoryformer study collect again") from None
    if lacking := [name for name in COLUMNS if name not in rows]:
        raise UserError(f"{path}: has no column {lacking[0]}; run memoryformer study collect again")
    for row in rows[rows["state"] == DONE].to_dict("records"):
        for name in _COSTS:
            if not math.isfinite(_number(path, row, name)):
                raise _no_number(path, row, name)
        if row[LOSS]:
            _number(path, row, LOSS)
    return rows


def _number(path: Path, row: Mapping[Hashable, str], name: str) -> float:
    try:
        return float(row[name])
    except ValueError:
        raise _no_number(path, row, name) from None


def _no_number(path: Path, row: Mapping[Hashable, str], name: str) -> UserError:
    return UserError(
        f"{path}: cell {row['cell']}: {name} is {row[name]!r}, which is no number; memoryformer study collect writes "
        "the table anew"
    )
