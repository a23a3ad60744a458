"""Draws architecture.md's pictures from the code's own numbers, and study.png from the table in studies.md.

`python docs/draw.py` in the repository's folder.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_train.config import Config
from mf_train.config.loading import load_config
from mf_train.drawing import make_figure, make_png
from mf_train.kernels.reference import hash_codes, lookup
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import Degrees, rows_of_rank
from mf_train.planning.work import data_parallel_bytes, tensor_parallel_bytes_per_token
from mf_train.study.analysis import Measured, analyse
from mf_train.study.plots import draw_frontiers

FOLDER = Path(__file__).parent
BLUE, ORANGE, GREY, PALE = "#2b6cb0", "#dd6b20", "#4a5568", "#e2e8f0"

TABLES, TAU, COLUMNS = 3, 4, 8  # of the layer that is drawn
TABLE_TOP, TABLE_HEIGHT, CELL = -2.9, 4.7, 0.4


def draw_layer() -> Any:
    """A memory layer at one token: features, bits, codes and weights, rows, output."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(TABLES * TAU, generator=generator)
    tables = torch.randn(TABLES, 2**TAU, COLUMNS, generator=generator)
    codes, weights = hash_codes(x, TABLES)
    y = lookup(codes, weights, tables)
    figure, (axes,) = make_figure(size=(8.6, 6.9))
    axes.axis("off")
    steps = {
        "features x\nof one token": 1.0,
        "bits": -1.0,
        "codes,\nweights": -1.9,
        f"tables:\n{2**TAU} rows,\n{COLUMNS} columns": -5.2,
        "output y": -9.0,
    }
    for name, height in steps.items():
        axes.text(-1.9, height, name, va="center", fontsize=10, weight="bold", color=GREY)
    for k in range(TABLES):
        _draw_chunk(axes, k, x[k * TAU : (k + 1) * TAU], int(codes[k]), float(weights[k]))
        _draw_table(axes, k, tables[k], int(codes[k]), float(weights[k]))
    middle = _left(1) + 1.75
    _draw_numbers(axes, y[None], middle - CELL * COLUMNS / 2, -8.75, 0.45)
    for k in range(TABLES):
        end = (middle + 0.7 * (k - 1), -8.7)
        axes.annotate("", end, (_left(k) + 1.75, -8.1), arrowprops={"arrowstyle": "->", "color": GREY})
    axes.set(xlim=(-2.0, 12.4), ylim=(-9.4, 3.3))
    return figure


def _left(k: int) -> float:
    return 4.2 * k + 0.2


def _draw_chunk(axes: Any, k: int, z: Tensor, code: int, weight: float) -> None:
    left, zero = _left(k), 1.0
    axes.text(left + 1.75, 3.05, f"chunk {k}: tau = {TAU} features", ha="center", fontsize=9.5)
    axes.plot([left, left + 3.5], [zero, zero], color=GREY, linewidth=0.8)
    for i, value in enumerate(z.tolist()):
        place, colour, up = left + 0.4 + 0.9 * i, BLUE if value >= 0 else ORANGE, value >= 0
        axes.bar(place, 0.75 * value, 0.7, bottom=zero, color=colour)
        number = zero + 0.75 * value + (0.1 if up else -0.1)
        style = {"fontsize": 8, "color": GREY, "ha": "center", "va": "bottom" if up else "top"}
        axes.text(place, number, f"{value:.1f}", **style)
        axes.text(place, -1.0, str(int(up)), ha="center", va="center", fontsize=11, color=colour)
    powers = " + ".join(str(2**i) for i in range(TAU) if code >> i & 1)
    sum_of = f"{powers} = {code}" if "+" in powers else str(code)
    axes.text(left + 1.75, -1.65, f"code = {sum_of}", ha="center", va="center", fontsize=9.5)
    axes.text(left + 1.75, -2.2, f"weight = {weight:.3f}", ha="center", va="center", fontsize=9.5)


def _draw_table(axes: Any, k: int, table: Tensor, code: int, weight: float) -> None:
    left, line = _left(k) + 0.4, TABLE_HEIGHT / len(table)
    width, top = CELL * COLUMNS, TABLE_TOP - code * line
    _draw_numbers(axes, table, left, TABLE_TOP, TABLE_HEIGHT)
    corners = [left, left + width, left + width, left, left], [top, top, top - line, top - line, top]
    axes.plot(*corners, color="black", linewidth=1.8)
    axes.plot([left - 0.35] * 2, [-2.45, top - line / 2], color="black", linewidth=1)
    axes.annotate(
        "",
        (left, top - line / 2),
        (left - 0.37, top - line / 2),
        arrowprops={"arrowstyle": "->", "shrinkA": 0},
    )
    axes.text(left + width / 2, -7.85, f"{weight:.3f} x row {code}", ha="center", va="center", fontsize=9.5)
    if k:
        axes.text(left - 0.7, -7.85, "+", ha="center", va="center", fontsize=12)


def _draw_numbers(axes: Any, numbers: Tensor, left: float, top: float, height: float) -> None:
    extent = (left, left + CELL * numbers.shape[1], top - height, top)
    axes.imshow(numbers.numpy(), extent=extent, aspect="auto", cmap="RdBu", alpha=0.5, vmin=-2, vmax=2)


TENSOR, DATA = 4, 2  # of the run that is drawn
BOX, GAP, ROW = 2.55, 0.3, 4.3  # widths and heights on the picture


def draw_processes() -> Any:
    """Eight processes that train configs/base.yaml: what each holds and trains on, and what they send."""
    config = load_config(FOLDER.parent / "configs/base.yaml", [f"parallel.tensor={TENSOR}"])
    figure, (axes,) = make_figure(size=(8.6, 5.9))
    axes.axis("off")
    for rank in range(TENSOR * DATA):
        _draw_process(axes, config, Degrees(rank, TENSOR * DATA, TENSOR))
    codes = tensor_parallel_bytes_per_token(config)
    for row in range(DATA):
        y = 3.05 - ROW * row
        end = TENSOR * (BOX + GAP) - GAP
        axes.annotate("", (end, y), (0, y), arrowprops={"arrowstyle": "<->", "color": BLUE, "linewidth": 1.6})
        line = (
            f"within a group of P = {TENSOR}: codes and weights of hashes, sums of norms, "
            f"{codes / 1e3:.0f} kB a token in both passes"
        )
        axes.text(end / 2, y + 0.12, line, ha="center", va="bottom", fontsize=9, color=BLUE)
    sent = data_parallel_bytes(config, DATA)
    for p in range(TENSOR):
        x = p * (BOX + GAP) + BOX / 2
        arrow = {"arrowstyle": "<->", "color": ORANGE, "linewidth": 1.6}
        axes.annotate("", (x, -0.15), (x, -0.95 + 0.15), arrowprops=arrow)
    line = (
        f"between R = {DATA} groups, each step: {sent['reduce gradients'] / 1e9:.1f} GB of gradients from every rank "
        f"(reduce-scatter), {sent['gather parameters'] / 1e9:.1f} GB of new weights (all-gather)"
    )
    axes.text(
        (TENSOR * (BOX + GAP) - GAP) / 2, -4.75, line, ha="center", va="center", fontsize=9, color=ORANGE
    )
    axes.set(xlim=(-0.15, TENSOR * (BOX + GAP)), ylim=(-5.0, 3.7))
    return figure


def _draw_process(axes: Any, config: Config, degrees: Degrees) -> None:
    left, bottom = degrees.tensor_rank * (BOX + GAP), -ROW * degrees.data_rank
    _draw_box(axes, left, bottom, BOX, 2.75, "white", GREY)
    for p in range(TENSOR):  # the tables' columns, this rank's in colour
        width = (BOX - 0.4) / TENSOR
        colour = BLUE if p == degrees.tensor_rank else PALE
        _draw_box(axes, left + 0.2 + p * width, bottom + 1.55, width, 0.65, colour, "white")
    rows = rows_of_rank(config, degrees.data_rank, DATA)
    parameters = count_parameters(config.model).total / TENSOR
    texts = [
        (2.45, f"rank {degrees.rank}", {"weight": "bold", "fontsize": 10}),
        (1.3, f"1/{TENSOR} of every table's columns", {}),
        (1.0, f"{parameters / 1e9:.2f} B parameters in all", {}),
        (0.7, f"AdamW for 1/{DATA} of them", {}),
        (0.25, f"sequences {rows[0]}, {rows[1]}, {rows[2]}, ...", {}),
    ]
    for height, text, style in texts:
        style = {"fontsize": 8.5, **style}
        axes.text(left + BOX / 2, bottom + height, text, ha="center", va="center", **style)


def _draw_box(
    axes: Any, left: float, bottom: float, width: float, height: float, fill: str, edge: str
) -> None:
    axes.bar(left + width / 2, height, width, bottom=bottom, color=fill, edgecolor=edge, linewidth=1.2)


def draw_study() -> bytes:
    """PNG: the mean losses of studies.md's table of sizes-small over training FLOPs."""
    rows = re.findall(
        r"^\| ([\d.e]+) \| (\d) \| ([\d.]+) \| ([\d.]+) \|", (FOLDER / "studies.md").read_text(), re.M
    )
    measured = [
        Measured(
            series=kind, axes={}, size=float(size), tokens=float(flops) / float(size), x=float(flops),
            losses=(float(loss),), seeds=("mean",), cells=(), parameters=0.0, flops=float(flops), shape=(size,),
        )
        for flops, size, *losses in rows
        for kind, loss in zip(("MemoryFormer", "dense"), losses, strict=True)
    ]  # fmt: skip
    return draw_frontiers(analyse(measured, "flops", "parameters", samples=1), "flops")


if __name__ == "__main__":
    (FOLDER / "study.png").write_bytes(draw_study())
    (FOLDER / "architecture-layer.png").write_bytes(make_png(draw_layer()))
    (FOLDER / "architecture-processes.png").write_bytes(make_png(draw_processes()))
