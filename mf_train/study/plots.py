"""Pictures of a study's results, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mf_train.drawing import make_figure, make_png, shade
from mf_train.study.analysis import Measured, Series, frontier

_MOST_NAMES = 8  # of sizes in a legend
_NAMES = {"flops": "training FLOPs", "bytes_moved": "bytes moved"}


def draw_all(series: Sequence[Series], measured: Sequence[Measured], x: str, size: str) -> dict[str, bytes]:
    """PNG files by name: loss over x, over tokens with L(N, D), parabolas, and over each axis."""
    found: dict[str, bytes] = {}
    if len({one.x for one in measured}) > 1:
        found[f"loss-over-{x}"] = _frontiers(series, x)
    if any(one.surface for one in series):
        found["loss-surface"] = _surfaces(series, size)
    if any(one.isoflop and one.isoflop.parabolas for one in series):
        found["isoflop"] = _parabolas(series, x, size)
    for axis in measured[0].axes if measured else ():
        if len({one.axes[axis] for one in measured}) > 1:
            found[f"axis-{axis}"] = _axis(measured, axis)
    return found


def _frontiers(series: Sequence[Series], x: str) -> bytes:
    figure, (axes,) = make_figure()
    for index, one in enumerate(series):
        colour = f"C{index % 10}"
        _points(axes, [m.x for m in one.measured], one.measured, colour, one.name)
        edge = frontier(one.measured)
        axes.plot([m.x for m in edge], [m.mean for m in edge], color=colour, linewidth=0.8, alpha=0.5)
        if one.curve:
            _line(axes, one.curve.law, [m.x for m in edge], colour)
    _label(axes, _NAMES.get(x, x.replace("_", " ")), "Pareto frontier, and its fit (dashed)")
    return make_png(figure)


def _surfaces(series: Sequence[Series], size: str) -> bytes:
    fitted = [one for one in series if one.surface]
    figure, several = make_figure(len(fitted))
    for axes, one in zip(several, fitted, strict=True):
        assert one.surface is not None
        sizes = sorted({m.size for m in one.measured})
        for index, value in enumerate(sizes):
            here = [m for m in one.measured if m.size == value]
            colour = shade(index / max(1, len(sizes) - 1))
            named = index % -(-len(sizes) // _MOST_NAMES) == 0 or index == len(sizes) - 1
            _points(axes, [m.tokens for m in here], here, colour, f"{value:.3g}" if named else "")
            tokens = np.geomspace(min(m.tokens for m in here) / 1.3, max(m.tokens for m in here) * 1.3, 50)
            points = np.column_stack([np.full(50, value), tokens])
            axes.plot(tokens, one.surface.law.predict(points), color=colour, linestyle="--", linewidth=1)
        _label(axes, "tokens", f"{one.name}: L(N, D); N: {size.replace('_', ' ')}")
    return make_png(figure)


def _parabolas(series: Sequence[Series], x: str, size: str) -> bytes:
    fitted = [one for one in series if one.isoflop and one.isoflop.parabolas]
    figure, several = make_figure(len(fitted))
    for axes, one in zip(several, fitted, strict=True):
        assert one.isoflop is not None
        for index, parabola in enumerate(one.isoflop.parabolas):
            here = [m for m in one.measured if abs(np.log(m.x / parabola.budget)) < 0.1]
            colour = f"C{index % 10}"
            sizes = [m.size for m in here]
            _points(axes, sizes, here, colour, f"{parabola.budget:.3g}")
            along = np.geomspace(min(sizes), max(sizes), 50)
            axes.plot(along, parabola.predict(along), color=colour, linestyle="--", linewidth=1)
            if parabola.inside:
                axes.plot(parabola.best, parabola.lowest, "*", color=colour, markersize=11)
        _label(axes, size.replace("_", " "), f"{one.name}: one budget of {_NAMES.get(x, x)} each")
    return make_png(figure)


def _axis(measured: Sequence[Measured], axis: str) -> bytes:
    """Loss over one axis; a line joins what differs in nothing else."""
    figure, (axes,) = make_figure()
    labels = list(dict.fromkeys(one.axes[axis] for one in measured))
    numeric = all(map(_is_number, labels))
    lines: dict[tuple[str, ...], list[Measured]] = {}
    for one in measured:
        rest = [f"{name}={label}" for name, label in one.axes.items() if name != axis]
        lines.setdefault(tuple(rest), []).append(one)
    for index, (others, line) in enumerate(lines.items()):
        at = [float(one.axes[axis]) if numeric else labels.index(one.axes[axis]) for one in line]
        order = np.argsort(at)
        colour = f"C{index % 10}"
        axes.plot(np.array(at)[order], [line[i].mean for i in order], color=colour, linewidth=0.8)
        _points(axes, at, line, colour, " ".join(others) if len(lines) <= 12 else "")
    _label(axes, axis.replace("_", " "), "mean and range of the seeds")
    values = [float(label) for label in labels] if numeric else []
    if not numeric or min(values) <= 0 or max(values) < 8 * min(values):
        axes.set_xscale("linear")
    if not numeric:
        axes.set_xticks(range(len(labels)), labels)
    return make_png(figure)


def _points(axes: Any, x: Sequence[float], measured: Sequence[Measured], colour: Any, label: str) -> None:
    means = np.array([one.mean for one in measured])
    low = means - [min(one.losses) for one in measured]
    high = [max(one.losses) for one in measured] - means
    axes.errorbar(
        x,
        means,
        yerr=np.maximum(np.array([low, high]), 0),
        fmt="o",
        markersize=4,
        capsize=2,
        color=colour,
        label=label or None,
    )


def _line(axes: Any, law: Any, x: Sequence[float], colour: str) -> None:
    along = np.geomspace(min(x), max(x), 60)
    axes.plot(along, law.predict(along[:, None]), color=colour, linestyle="--", linewidth=1)


def _label(axes: Any, x: str, title: str) -> None:
    axes.set_xscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel("validation loss, nats a token")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7)


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False
