"""Losses by the values of each axis: mean and spread over the seeds, and differences from the axis's first value."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mf_train.study.analysis import Measured
from mf_train.study.bootstrap import LEVEL, Interval
from mf_train.study.fit import student_quantile

SUMMARY = "summary.md"
_HEAD = ("n", "mean", "std", "min to max", "difference")


@dataclass(frozen=True)
class Line:
    """One value of an axis, with the other axes fixed."""

    others: dict[str, str]
    value: str
    measured: Measured
    difference: Interval | None = None  # of the mean from `base`; None for that itself
    pairs: int = 0  # seeds that both have
    base: str = ""  # the first value of the axis that is there beside these others


@dataclass(frozen=True)
class AxisTable:
    """One axis: a line for each value it has beside each choice of the others. No axis: all configurations."""

    axis: str
    first: str  # the value that others are compared with, where it is there
    lines: tuple[Line, ...]


def axis_tables(measured: Sequence[Measured], order: Mapping[str, Sequence[str]]) -> list[AxisTable]:
    """A table for each axis with several values, or else one of all configurations.

    `order`: the values of each axis as the study lists them.
    """
    labels: dict[str, list[str]] = {}
    for axis in measured[0].axes if measured else ():
        found = dict.fromkeys(one.axes[axis] for one in measured)
        known = [label for label in order.get(axis, ()) if label in found]
        labels[axis] = known + [label for label in found if label not in known]
    tables = [_axis_table(measured, axis, labels) for axis in labels if len(labels[axis]) > 1]
    if measured and not any(table.lines for table in tables):
        return [AxisTable("", "", tuple(Line(one.axes, "", one) for one in measured))]
    return [table for table in tables if table.lines]


def _axis_table(measured: Sequence[Measured], axis: str, labels: Mapping[str, Sequence[str]]) -> AxisTable:
    groups: dict[tuple[str, ...], dict[str, Measured]] = {}
    others = [name for name in labels if name != axis]
    for one in sorted(measured, key=lambda one: [labels[name].index(one.axes[name]) for name in others]):
        groups.setdefault(tuple(one.axes[name] for name in others), {})[one.axes[axis]] = one
    first = labels[axis][0]
    lines = []
    for place, found in groups.items():
        if len(found) == 1:
            continue  # nothing to compare it with
        base, *rest = (label for label in labels[axis] if label in found)
        fixed = dict(zip(others, place, strict=True))
        lines.append(Line(fixed, base, found[base]))
        for value in rest:
            lines.append(Line(fixed, value, found[value], *difference(found[value], found[base]), base))
    return AxisTable(axis, first, tuple(lines))


def difference(one: Measured, base: Measured) -> tuple[Interval, int]:
    """Mean loss of `one` minus that of `base`, nats, with Student's interval over the seeds that both have, and those.

    A seed sets the order of the data too, so the seeds are compared in pairs. NaN bounds with fewer than two pairs, and
    the difference of all means with none.
    """
    pairs = [
        loss - base.losses[base.seeds.index(seed)]
        for seed, loss in zip(one.seeds, one.losses, strict=True)
        if seed in base.seeds
    ]
    if len(pairs) < 2:
        return Interval(pairs[0] if pairs else one.mean - base.mean, math.nan, math.nan), len(pairs)
    mean = sum(pairs) / len(pairs)
    spread = math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / (len(pairs) - 1) / len(pairs))
    reach = student_quantile((1 + LEVEL) / 2, len(pairs) - 1) * spread
    return Interval(mean, mean - reach, mean + reach), len(pairs)


def deviation(losses: Sequence[float]) -> float:
    """Standard deviation of a sample; NaN of one."""
    if len(losses) < 2:
        return math.nan
    mean = sum(losses) / len(losses)
    return math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))


def markdown(name: str, tables: Sequence[AxisTable], notes: Sequence[str]) -> str:
    """The tables as Markdown, and what is to be known beside them."""
    parts = [f"# {name}", NOTE]
    for table in tables:
        parts.append(f"## {_title(table)}")
        head, rows = _cells(table)
        lines = [head, ["---"] * len(head), *rows]
        parts.append(
            "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in lines)
        )
    if notes:
        parts.append("\n".join(f"- {note}" for note in map(str.strip, notes)))
    return "\n\n".join(parts) + "\n"


def to_html(tables: Sequence[AxisTable]) -> str:
    """The tables for the report."""
    found = []
    for table in tables:
        head, rows = _cells(table)
        found.append(
            f"<h3>{html.escape(_title(table))}</h3>\n"
            + '<div class="scroll"><table><tr>'
            + "".join(f"<th>{html.escape(text)}</th>" for text in head)
            + "</tr>\n"
            + "".join(
                "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>\n" for row in rows
            )
            + "</table></div>\n"
        )
    return "".join(found)


NOTE = (
    "Validation loss after the last step, nats a token. n: seeds. difference: from the first value of the axis, "
    f"the same seeds in pairs, with the {LEVEL:.0%} interval of Student's t over the pairs; it needs two. Means are "
    "of all seeds: where the pairs are fewer, a difference is not that of the means."
)


def _title(table: AxisTable) -> str:
    return f"{table.axis}, compared with {table.first}" if table.axis else "configurations"


def _cells(table: AxisTable) -> tuple[list[str], list[list[str]]]:
    # other axes that are the same in all lines would say nothing
    others = [name for name in table.lines[0].others if len({line.others[name] for line in table.lines}) > 1]
    if not table.axis:  # nothing is compared
        head = [*others, "parameters", "tokens", "FLOPs", *_HEAD[:-1]]
        return head, [
            [*(line.others[name] for name in others), *_losses(line.measured)] for line in table.lines
        ]
    head = [*others, table.axis, "parameters", "tokens", "FLOPs", *_HEAD]
    rows = [
        [
            *(line.others[name] for name in others),
            line.value,
            *_losses(line.measured),
            _apart(line, table.first),
        ]
        for line in table.lines
    ]
    return head, rows


def _apart(line: Line, first: str) -> str:
    """Such as `-0.0100 [-0.0150, -0.0050] (3 pairs)`, with what it is from where that is not the axis's first value."""
    apart = line.difference
    if apart is None:
        return ""
    bounds = f" [{apart.low:+.4f}, {apart.high:+.4f}]" if math.isfinite(apart.low) else ""
    pairs = f"{line.pairs or 'no'} pair{'' if line.pairs == 1 else 's'}"
    return f"{apart.value:+.4f}{bounds} ({pairs}{'' if line.base == first else f', from {line.base}'})"


def _losses(one: Measured) -> list[str]:
    spread = deviation(one.losses)
    return [
        f"{one.parameters:,.0f}",
        f"{one.tokens:,.0f}",
        f"{one.flops:.3g}",
        str(len(one.losses)),
        f"{one.mean:.4f}",
        f"{spread:.4f}" if math.isfinite(spread) else "",
        f"{min(one.losses):.4f} to {max(one.losses):.4f}",
    ]
