"""Pictures of a study's results, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mf_train.drawing import make_figure, make_png, scale_loss, shade
from mf_train.study.analysis import Measured, Series, frontier

_MOST_NAMES = 8  # in a legend
_MOST_COLUMNS = 2  # of the parts of one picture
_CURVE_POINTS = 60  # of a curve of training losses, at most
_LOSS = "validation loss (nats per token)"
_QUANTITIES = {
    "flops": "training FLOPs",
    "bytes_moved": "bytes moved in training (B)",
    "parameters": "parameters",
    "table_parameters": "parameters in tables",
    "block_parameters": "parameters of the blocks",
    "tokens": "training tokens",
    "tokens_per_parameter": "training tokens per parameter",
    "learning_rate": "peak learning rate",
    "bits": "bits of a code",
    "expand_bits": "expanding bits",
    "size": "depth (layers)",
    "kind": "kind of model",
}


class Picture(NamedTuple):
    """A picture with what stands above and below it."""

    title: str
    caption: str
    png: bytes
    wide: bool = False  # of several parts


class Curves(NamedTuple):
    """The training losses of one cell over its tokens, and whether they are validation losses."""

    tokens: tuple[float, ...]
    losses: tuple[float, ...]  # nats per token
    validation: bool


def draw_all(
    series: Sequence[Series],
    measured: Sequence[Measured],
    x: str,
    size: str,
    curves: Mapping[str, Curves] = {},
) -> dict[str, Picture]:
    """The pictures by the names of their files: the Pareto frontier over `x`, L(N, D) over the tokens, IsoFLOP
    parabolas, learning curves (`curves`, by cell), and the loss over each axis with several values.
    """
    found: dict[str, Picture] = {}
    several = len(series) > 1
    if len({one.x for one in measured}) > 1:
        fitted = any(one.curve for one in series)
        found[f"loss-over-{x}"] = Picture(
            f"Pareto frontier: loss over {quantity(x)}",
            "A point is one configuration, the mean over its seeds; its bar reaches from the lowest to the highest "
            "seed. Filled points and the solid line: the Pareto frontier, on which no cheaper configuration has a "
            "lower loss." + (" Dashed: the power law that was fitted to the frontier." if fitted else ""),
            draw_frontiers(series, x),
        )
    if any(one.surface for one in series):
        found["loss-surface"] = Picture(
            "Scaling law L(N, D)",
            f"A colour is one N ({quantity(size)}). Dashed: the fitted law L(N, D) = E + A / N^a + B / D^b.",
            _surfaces(series, size),
            wide=several,
        )
    if any(one.isoflop and one.isoflop.parabolas for one in series):
        found["isoflop"] = Picture(
            f"IsoFLOP parabolas: the best size at each budget of {quantity(x)}",
            "A colour is one budget. Dashed: a parabola over the logarithm of the size. Star: its minimum, where that "
            "lies among the sizes that were run.",
            _parabolas(series, x, size),
            wide=several,
        )
    if any(cell in curves for one in measured for cell in one.cells):
        found["learning-curves"] = Picture(
            "Learning curves",
            "A line is one run; a colour is one configuration, from the smallest (dark) to the largest (light). "
            "Training losses are means of neighbouring steps, ever more of them.",
            _learning(measured, curves),
            wide=several,
        )
    for axis in measured[0].axes if measured else ():
        if len({one.axes[axis] for one in measured}) > 1:
            found[f"axis-{axis}"] = Picture(
                f"Loss over {quantity(axis)}",
                "Means over the seeds; a bar reaches from the lowest to the highest seed. A colour is one choice of "
                "the other axes.",
                _axis(measured, axis),
            )
    return found


def quantity(name: str) -> str:
    """The words for a column or an axis, with the unit; a dotted key of the configuration stays as it is."""
    return _QUANTITIES.get(name, name if "." in name else name.replace("_", " "))


def draw_frontiers(series: Sequence[Series], x: str) -> bytes:
    """PNG: loss over the cost `x`, the Pareto frontier of each series and its fit."""
    figure, (axes,) = make_figure(size=(7.2, 4.6))
    for index, one in enumerate(series):
        colour = f"C{index % 10}"
        edge = frontier(one.measured)
        others = [m for m in one.measured if m not in edge]
        _points(axes, [m.x for m in others], others, colour, "", hollow=True)
        _points(axes, [m.x for m in edge], edge, colour, one.name)
        axes.plot([m.x for m in edge], [m.mean for m in edge], color=colour, linewidth=1)
        if one.curve:
            along = np.geomspace(edge[0].x, edge[-1].x, 60)
            predicted = one.curve.law.predict(along[:, None])
            axes.plot(along, predicted, color=colour, linestyle="--", linewidth=1)
    axes.plot([], [], color="grey", linewidth=1, label="Pareto frontier")
    if any(one.curve for one in series):
        axes.plot([], [], color="grey", linestyle="--", linewidth=1, label="power law fitted to it")
    _finish(axes, quantity(x))
    scale_loss(axes)
    return make_png(figure)


def _surfaces(series: Sequence[Series], size: str) -> bytes:
    fitted = [one for one in series if one.surface]
    figure, several = _parts(len(fitted))
    for axes, one in zip(several, fitted, strict=False):
        assert one.surface is not None
        sizes = sorted({m.size for m in one.measured})
        for index, value in enumerate(sizes):
            here = [m for m in one.measured if m.size == value]
            colour = shade(index / max(1, len(sizes) - 1))
            _points(
                axes,
                [m.tokens for m in here],
                here,
                colour,
                f"N = {value:.3g}" if _named(index, len(sizes)) else "",
            )
            tokens = np.geomspace(min(m.tokens for m in here) / 1.3, max(m.tokens for m in here) * 1.3, 50)
            points = np.column_stack([np.full(50, value), tokens])
            axes.plot(tokens, one.surface.law.predict(points), color=colour, linestyle="--", linewidth=1)
        _finish(axes, quantity("tokens"), one.name)
        scale_loss(axes)
    return make_png(figure)


def _parabolas(series: Sequence[Series], x: str, size: str) -> bytes:
    fitted = [one for one in series if one.isoflop and one.isoflop.parabolas]
    figure, several = _parts(len(fitted))
    for axes, one in zip(several, fitted, strict=False):
        assert one.isoflop is not None
        count = len(one.isoflop.parabolas)
        for index, parabola in enumerate(one.isoflop.parabolas):
            here = [m for m in one.measured if abs(np.log(m.x / parabola.budget)) < 0.1]
            colour = shade(index / max(1, count - 1))
            sizes = [m.size for m in here]
            _points(axes, sizes, here, colour, f"{parabola.budget:.3g}" if _named(index, count) else "")
            along = np.geomspace(min(sizes), max(sizes), 50)
            axes.plot(along, parabola.predict(along), color=colour, linestyle="--", linewidth=1)
            if parabola.inside:
                axes.plot(parabola.best, parabola.lowest, "*", color=colour, markersize=11)
        _finish(axes, quantity(size), one.name, legend=quantity(x))
    return make_png(figure)


def _learning(measured: Sequence[Measured], curves: Mapping[str, Curves]) -> bytes:
    parts: dict[str, list[Measured]] = {}
    for one in measured:
        if any(cell in curves for cell in one.cells):
            parts.setdefault(one.series, []).append(one)
    figure, several = _parts(len(parts))
    for axes, (name, here) in zip(several, parts.items(), strict=False):
        varying = [axis for axis in here[0].axes if len({one.axes[axis] for one in here}) > 1]
        kinds = set()
        for index, one in enumerate(sorted(here, key=lambda one: (one.size, one.tokens))):
            label = ", ".join(f"{axis} {one.axes[axis]}" for axis in varying)
            label = label if _named(index, len(here)) else ""
            for cell in one.cells:
                if cell in curves:
                    curve = curves[cell]
                    kinds.add("validation" if curve.validation else "training")
                    marker = "o" if curve.validation and len(curve.tokens) <= 30 else None
                    colour = shade(index / max(1, len(here) - 1))
                    axes.plot(
                        *_smooth(curve),
                        color=colour,
                        linewidth=1,
                        marker=marker,
                        markersize=3,
                        label=label or None,
                    )
                    label = ""
        _finish(axes, quantity("tokens"), name)
        axes.set_ylabel(f"{' or '.join(sorted(kinds))} loss (nats per token)")
        scale_loss(axes)
    return make_png(figure)


def _smooth(curve: Curves) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Tokens and losses as they are drawn: of training losses the means of ever more steps, since tokens are on a
    logarithmic axis.
    """
    tokens, losses = np.array(curve.tokens), np.array(curve.losses)
    if curve.validation:
        return tokens, losses
    starts = np.unique(np.geomspace(1, len(tokens) + 1, _CURVE_POINTS + 1).astype(int) - 1)[:-1]
    counts = np.diff(np.append(starts, len(tokens)))
    return np.add.reduceat(tokens, starts) / counts, np.add.reduceat(losses, starts) / counts


def _axis(measured: Sequence[Measured], axis: str) -> bytes:
    """Loss over one axis. A line joins numbers that differ in nothing else; names stand side by side, unjoined."""
    figure, (axes,) = make_figure(size=(7.2, 4.6))
    labels = list(dict.fromkeys(one.axes[axis] for one in measured))
    numeric = all(map(_is_number, labels))
    lines: dict[tuple[str, ...], list[Measured]] = {}
    others = [n for n in measured[0].axes if n != axis and len({one.axes[n] for one in measured}) > 1]
    for one in measured:
        lines.setdefault(tuple(f"{name} {one.axes[name]}" for name in others), []).append(one)
    for index, (rest, line) in enumerate(lines.items()):
        colour: Any = f"C{index}" if len(lines) <= 10 else shade(index / (len(lines) - 1))
        label = ", ".join(rest) if _named(index, len(lines)) else ""
        if numeric:
            line = sorted(line, key=lambda one: float(one.axes[axis]))
            at = [float(one.axes[axis]) for one in line]
            axes.plot(at, [one.mean for one in line], color=colour, linewidth=0.8)
        else:
            aside = 0.5 * ((index + 0.5) / len(lines) - 0.5)  # so that bars do not cover each other
            at = [labels.index(one.axes[axis]) + aside for one in line]
        _points(axes, at, line, colour, label)
    _finish(axes, quantity(axis))
    if numeric:
        _scale_numbers(axes, sorted(map(float, labels)))
    else:
        axes.set_xscale("linear")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.6, len(labels) - 0.4)
    return make_png(figure)


def _scale_numbers(axes: Any, values: list[float]) -> None:
    """A logarithmic scale where the values are more evenly spaced on one, and a tick at each of a few values."""
    steps = np.diff(values)
    ratios = np.diff(np.log(values)) if values[0] > 0 else None
    if ratios is None or np.std(steps) / np.mean(steps) <= np.std(ratios) / np.mean(ratios):
        axes.set_xscale("linear")
    if len(values) <= _MOST_NAMES:
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xticks([], minor=True)


def _parts(count: int) -> tuple[Any, list[Any]]:
    """A figure and `count` axes or one more, which is empty then."""
    columns = min(count, _MOST_COLUMNS)
    figure, several = make_figure(columns, (7.2 if columns == 1 else 5.6, 4.6), -(-count // columns))
    for axes in several[count:]:
        axes.set_axis_off()
    return figure, several


def _named(index: int, count: int) -> bool:
    """Whether a legend of `count` ordered entries shows this one."""
    return index % -(-count // _MOST_NAMES) == 0 or index == count - 1


def _points(
    axes: Any, x: Sequence[float], measured: Sequence[Measured], colour: Any, label: str, hollow: bool = False
) -> None:
    means = np.array([one.mean for one in measured])
    low = means - [min(one.losses) for one in measured]
    high = [max(one.losses) for one in measured] - means
    axes.errorbar(
        x,
        means,
        yerr=np.maximum(np.array([low, high]), 0),
        fmt="o",
        markersize=4,
        markerfacecolor="white" if hollow else colour,
        capsize=2,
        linewidth=0.8,
        color=colour,
        label=label or None,
    )


def _finish(axes: Any, x: str, title: str = "", legend: str = "") -> None:
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(_LOSS)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, title=legend or None, title_fontsize=7)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
