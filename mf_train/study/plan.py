"""What `study plan` prints: a line for each cell with its predicted cost, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mf_train.study.cells import Cell, Grid, describe_values
from mf_train.study.state import cell_state
from mf_train.study.study import Study
from mf_train.text import duration


def plan_lines(study: Study, grid: Grid) -> Iterator[str]:
    """A table of the cells, the sums, and the places of the grid that are not run."""
    names = [axis.name for axis in study.axes]
    numbers = ("steps", "parameters", "tables", "tokens", "FLOPs", "bytes moved", "GB", "time")
    head = ["cell", *names, *numbers, "state"]
    rows = [head, *(_row(cell, names) for cell in grid.cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        yield "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
    flops = sum(cell.cost.flops for cell in grid.cells)
    seconds = [cell.seconds for cell in grid.cells if cell.seconds is not None]
    time = f", {duration(sum(seconds))} one after another" if seconds else ""
    yield f"{len(grid.cells)} cells of {study.processes} processes: {flops:.3g} FLOPs{time}"
    device = f" on {study.budget.device.name}" if study.budget.device else ""
    yield f"GB: peak of a process{device}, as `memoryformer plan` models it; time: of the steps alone"
    if not grid.cells:
        yield "no cell is left to run"
    if grid.earlier:
        yield f"{grid.earlier} more cells in {study.folder}, of other settings or axes, are not of this grid"
    if grid.left_out:
        yield f"left out: {len(grid.left_out)}"
    for one in grid.left_out:
        yield f"  {describe_values(one.values)}: {one.reason}"


def _row(cell: Cell, names: Sequence[str]) -> list[str]:
    cost = cell.cost
    return [
        str(cell.number),
        *(cell.values[name] for name in names),
        str(cell.config.training.steps),
        f"{cost.parameters:,}",
        f"{cost.table_parameters:,}",
        f"{cost.tokens:,}",
        f"{cost.flops:.3g}",
        f"{cost.bytes_moved:.3g}",
        f"{cell.memory / 1e9:.3g}",
        duration(cell.seconds) if cell.seconds is not None else "-",
        cell_state(cell).name,
    ]
