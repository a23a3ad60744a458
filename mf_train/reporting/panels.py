"""A run's curves as pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mf_train.drawing import make_figure, make_png, shade
from mf_train.reporting.history import Curve, Event, History

_MOST_POINTS = 1000  # of a curve; more are drawn as the mean, least and most of as many spans of steps
_MOST_NAMES = 8  # in a legend
_COLOURS = {"phase": "C4", "resumed": "C2", "skipped": "C3"}


class Panel(NamedTuple):
    """One picture: the curves whose names match, divided by `divisor`."""

    title: str
    unit: str  # of the vertical axis
    names: str  # a regular expression
    divisor: float = 1.0
    logarithmic: bool = False


_NATS = "nats per token"
PANELS = (
    Panel("training and validation loss", _NATS, "loss|validation_loss"),
    Panel("validation losses", _NATS, "validation.*loss.*"),
    Panel("gradient norm before clipping", "L2 norm", "grad_norm", logarithmic=True),
    Panel("learning rate", "learning rate", "learning_rate"),
    Panel("throughput", "tokens/s", "tokens_per_second"),
    Panel(
        "time of a step and its waits",
        "seconds",
        "step_seconds|data_wait_seconds|checkpoint.*_seconds",
        logarithmic=True,
    ),
    Panel(
        "step time of the ranks, without waiting for others", "seconds", "rank_seconds_(least|median|most)"
    ),
    Panel("utilisation", "share of the device's peak", "flops_share|bandwidth_share"),
    Panel("peak memory of rank 0", "GB", "peak_memory_bytes", 1e9),
    Panel("rows of the tables that were read", "share of the rows", r"tables\..*\.rows_read"),
    Panel("entropy of the codes", "share of the maximum", r"tables\..*\.entropy"),
    Panel("reads of a table's most-read row", "share of its reads", r"tables\..*\.largest_share"),
)


def draw(history: History) -> dict[str, bytes]:
    """PNG files by title, of the panels that have a curve."""
    found = {}
    for panel in PANELS:
        names = [name for name in history.curves if re.fullmatch(panel.names, name)]
        curves = {name: history.curves[name] for name in sorted(names, key=_natural)}
        if curves:
            found[panel.title] = _draw(panel, curves, history.events)
    return found


class Points(NamedTuple):
    """A curve as it is drawn."""

    steps: NDArray[np.float64]
    means: NDArray[np.float64]
    least: NDArray[np.float64]
    most: NDArray[np.float64]


def thin(curve: Curve, points: int = _MOST_POINTS) -> Points:
    """At most so many points; each stands for as many neighbours as the others, with their mean, least and most."""
    steps, values = np.array(curve.steps, float), np.array(curve.values)
    if len(steps) <= points:
        return Points(steps, values, values, values)
    starts = np.arange(points) * len(steps) // points
    counts = np.diff(np.append(starts, len(steps)))
    return Points(
        np.add.reduceat(steps, starts) / counts,
        np.add.reduceat(values, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.maximum.reduceat(values, starts),
    )


def _draw(panel: Panel, curves: dict[str, Curve], events: Sequence[Event]) -> bytes:
    figure, (axes,) = make_figure(size=(6.4, 3.2))
    for index, (name, curve) in enumerate(curves.items()):
        many = len(curves) > _MOST_NAMES
        colour: Any = shade(index / (len(curves) - 1)) if many else f"C{index}"
        steps, means, least, most = (np.asarray(part) for part in thin(curve))
        marker = "o" if len(steps) <= 50 else None
        named = not many or index in (0, len(curves) - 1)
        axes.plot(
            steps, means / panel.divisor, color=colour, linewidth=1, marker=marker, markersize=3,
            label=name.removeprefix("tables.").replace("_", " ") if named else None,
        )  # fmt: skip
        axes.fill_between(
            steps, least / panel.divisor, most / panel.divisor, color=colour, alpha=0.2, linewidth=0
        )
    for kind, colour in _COLOURS.items():
        at = [event.step for event in events if event.kind == kind]
        for step in at[-200:]:
            axes.axvline(step, color=colour, linewidth=0.8, linestyle=":")
        if at and panel is PANELS[0]:
            axes.plot([], [], color=colour, linestyle=":", label=kind)
    if panel.logarithmic:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    axes.set_title(panel.title, fontsize=10)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=7)
    return make_png(figure)


def _natural(name: str) -> list[Any]:
    """blocks.2 before blocks.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
