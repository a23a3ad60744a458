"""Losses by the values of each axis: mean and spread over the seeds, and differences from the axis's first value."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mf_train.study.analysis import Measured
from mf_train.study.bootstrap import LEVEL, Interval
from mf_train.study.fit import student_quantile

SUMMARY = "summary.md"
NOTE = (
    "Validation loss after the last step, nats a token. n: seeds. difference: from the first value of the axis, "
    f"the same seeds in pairs, with the {LEVEL:.0%} interval of Student's t over the pairs; it needs two. Means are "
    "of all seeds: where the pairs are fewer, a difference is not that of the means."
)
_HEAD = ("parameters", "tokens", "FLOPs", "n", "mean", "std", "min to max")


@dataclass(frozen=True)
class LossTable:
    """Text to show: a row for each value of one axis beside each choice of the others, or for each configuration."""

    title: str
    head: list[str]
    rows: list[list[str]]


def loss_tables(measured: Sequence[Measured], order: Mapping[str, Sequence[str]]) -> list[LossTable]:
    """A table for each axis with several values, or else one of all configurations.

    `order`: the values of each axis as the study lists them.
    """
    labels = order_labels(measured, order)
    tables = [table for axis in labels if (table := _axis_table(measured, axis, labels))]
    if tables or not measured:
        return tables
    names = _varying(measured)
    rows = [[*(one.axes[name] for name in names), *_numbers(one)] for one in measured]
    return [LossTable("configurations", [*names, *_HEAD], rows)]


def _axis_table(
    measured: Sequence[Measured], axis: str, labels: Mapping[str, Sequence[str]]
) -> LossTable | None:
    """None where no two configurations differ in this axis alone."""
    first = labels[axis][0]
    lines: list[tuple[Measured, str]] = []
    for base, *rest in group_by_others(measured, axis, labels):
        if rest:
            lines += [(base, ""), *((one, _difference_text(one, base, axis, first)) for one in rest)]
    if not lines:
        return None
    names = [name for name in _varying([one for one, _ in lines]) if name != axis]
    rows = [
        [*(one.axes[name] for name in names), one.axes[axis], *_numbers(one), text] for one, text in lines
    ]
    return LossTable(f"{axis}, compared with {first}", [*names, axis, *_HEAD, "difference"], rows)


def order_labels(measured: Sequence[Measured], order: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The values of each axis that were measured, as the study lists them, then those that it lists no more."""
    labels: dict[str, list[str]] = {}
    for axis in measured[0].axes if measured else ():
        found = [one.axes[axis] for one in measured]
        labels[axis] = [label for label in dict.fromkeys([*order.get(axis, ()), *found]) if label in found]
    return labels


def group_by_others(
    measured: Sequence[Measured], axis: str, labels: Mapping[str, Sequence[str]]
) -> Iterator[list[Measured]]:
    """Configurations that differ in this axis alone, one of each of its values, in the order of `order_labels`."""

    def others(one: Measured) -> list[int]:
        return [labels[name].index(label) for name, label in one.axes.items() if name != axis]

    ordered = sorted(measured, key=lambda one: (others(one), labels[axis].index(one.axes[axis])))
    for _, group in itertools.groupby(ordered, key=others):
        yield list({one.axes[axis]: one for one in group}.values())


def _varying(measured: Sequence[Measured]) -> list[str]:
    """Axes that differ: the others would say nothing."""
    return [name for name in measured[0].axes if len({one.axes[name] for one in measured}) > 1]


def difference(one: Measured, base: Measured) -> tuple[Interval, int]:
    """Mean loss of `one` minus that of `base`, nats, with Student's interval over the seeds that both have, and those.

    A seed sets the order of the data too, so the seeds are compared in pairs. NaN bounds with fewer than two pairs, and
    the difference of all means with none.
    """
    from pandas import Series

    pairs = (Series(one.losses, one.seeds) - Series(base.losses, base.seeds)).dropna()
    value = pairs.mean() if len(pairs) else one.mean - base.mean
    reach = student_quantile((1 + LEVEL) / 2, len(pairs) - 1) * pairs.sem() if len(pairs) > 1 else math.nan
    return Interval(value, value - reach, value + reach), len(pairs)


def _difference_text(one: Measured, base: Measured, axis: str, first: str) -> str:
    """Such as `-0.0100 [-0.0150, -0.0050] (3 pairs)`, with what it is from where that is not the axis's first value."""
    apart, count = difference(one, base)
    bounds = f" [{apart.low:+.4f}, {apart.high:+.4f}]" if math.isfinite(apart.low) else ""
    pairs = f"{count or 'no'} pair{'' if count == 1 else 's'}"
    origin = "" if base.axes[axis] == first else f", from {base.axes[axis]}"
    return f"{apart.value:+.4f}{bounds} ({pairs}{origin})"


def _numbers(one: Measured) -> list[str]:
    """What _HEAD names."""
    return [
        f"{one.parameters:,.0f}",
        f"{one.tokens:,.0f}",
        f"{one.flops:.3g}",
        str(len(one.losses)),
        f"{one.mean:.4f}",
        f"{statistics.stdev(one.losses):.4f}" if len(one.losses) > 1 else "",
        f"{min(one.losses):.4f} to {max(one.losses):.4f}",
    ]


def markdown(
    name: str, tables: Sequence[LossTable], notes: Sequence[str], conclusions: Sequence[str] = ()
) -> str:
    """The conclusions and the tables as Markdown, and what is to be known beside them."""
    parts = [f"# {name}"]
    if conclusions:
        parts.append("\n".join(f"- {one}" for one in conclusions))
    parts.append(NOTE)
    for table in tables:
        rows = [table.head, ["---"] * len(table.head), *table.rows]
        lines = ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in rows]
        parts += [f"## {table.title}", "\n".join(lines)]
    if notes:
        parts.append("\n".join(f"- {note.strip()}" for note in notes))
    return "\n\n".join(parts) + "\n"
