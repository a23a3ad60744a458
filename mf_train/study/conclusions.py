"""What a study found, in sentences: the best configuration, each axis's best value, what the fits identify."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mf_train.study.analysis import Measured, Series
from mf_train.study.bootstrap import LEVEL, LawFit
from mf_train.study.study import LENGTHS
from mf_train.study.summary import difference, group_by_others, order_labels

_MOST_VALUES = 8  # that are listed


def conclude(
    series: Sequence[Series], measured: Sequence[Measured], order: Mapping[str, Sequence[str]], x: str
) -> Iterator[str]:
    """Sentences, the most important first; none where nothing was measured.

    `order`: the values of each axis as the study lists them; `x`: the cost that the fits are over.
    """
    if not measured:
        return
    yield _best(measured)
    labels = order_labels(measured, order)
    for axis in labels:
        if sentence := _axis(measured, axis, labels):
            yield sentence
    for one in series:
        yield from _fits(one, x)


def _best(measured: Sequence[Measured]) -> str:
    one = min(measured, key=lambda one: one.mean)
    names = [name for name in one.axes if len({other.axes[name] for other in measured}) > 1]
    place = ", ".join(f"{name} {one.axes[name]}" for name in names)
    seeds = f"the mean of {len(one.losses)} seeds" if len(one.losses) > 1 else "one seed"
    return (
        f"The lowest validation loss is {one.mean:.4f} nats per token ({seeds})"
        f"{f', of {place}' if place else ''}: {one.parameters:,.0f} parameters, {one.tokens:,.0f} training tokens, "
        f"{one.flops:.3g} training FLOPs."
    )


@dataclass(frozen=True)
class _Gap:
    """How far a value of an axis lies from another one, where the other axes are the same."""

    apart: float  # nats per token
    resolved: bool | None  # whether the interval over the seeds leaves out 0; None: there is no interval


def _axis(measured: Sequence[Measured], axis: str, labels: Mapping[str, Sequence[str]]) -> str:
    """The value of an axis that is most often the best; '' where no two configurations differ in this axis alone."""
    groups = [group for group in group_by_others(measured, axis, labels) if len(group) > 1]
    if not groups:
        return ""
    wins = Counter(min(group, key=lambda one: one.mean).axes[axis] for group in groups)
    values = [
        label for label in labels[axis] if any(one.axes[axis] == label for group in groups for one in group)
    ]
    best = max(values, key=lambda label: wins[label])
    other = next(label for label in values if label != best) if best != values[0] else values[-1]
    gaps = list(_gaps(groups, axis, best, other))
    words = f"{axis}: {best} has the lowest loss in {wins[best]} of {_count(len(groups), 'comparison')}"
    if len(values) > 2:
        words += f" over {list_values(values)}"
    if gaps:
        words += f"; {_apart([gap.apart for gap in gaps], other)}{_resolved(gaps)}"
    numbers = _numbers(values)
    if len(numbers) > 2 and axis not in LENGTHS and float(best) in (min(numbers), max(numbers)):
        words += ". It is the end of the range that was run, so the best value may lie beyond"
    return words + "."


def _gaps(groups: Sequence[Sequence[Measured]], axis: str, best: str, other: str) -> Iterator[_Gap]:
    for group in groups:
        places = {one.axes[axis]: one for one in group}
        if best in places and other in places:
            apart, count = difference(places[best], places[other])
            yield _Gap(apart.value, None if count < 2 else apart.high < 0 or apart.low > 0)


def _apart(gaps: Sequence[float], other: str) -> str:
    mean = sum(gaps) / len(gaps)
    span = f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
    return f"on average {mean:+.3f} nats per token from {other}{span}"


def _resolved(gaps: Sequence[_Gap]) -> str:
    known = [gap for gap in gaps if gap.resolved is not None]
    if not known:
        return ", with one seed, so that the noise is not known"
    return (
        f"; the {LEVEL:.0%} interval over the seeds leaves out 0 in {sum(bool(gap.resolved) for gap in known)} of "
        f"{len(known)}"
    )


def _fits(series: Series, x: str) -> Iterator[str]:
    """What the fits of a series identify, and how many doubts there are."""
    found: list[str] = []
    doubts: list[str] = []
    for name, fit in (("L(N, D)", series.surface), ("the Pareto frontier", series.curve)):
        if fit:
            doubts += fit.warnings
            found += _identified(name, fit)
    if series.isoflop:
        doubts += series.isoflop.warnings
        growth = series.isoflop.exponent
        if (
            growth
            and math.isfinite(growth.low)
            and not any("exponent" in one for one in series.isoflop.warnings)
        ):
            found.append(f"the best size grows as {x} ** {growth}")
    if found:
        yield f"{series.name}: {'; '.join(found)}."
    if doubts:
        rest = "" if found else "no exponent is identified: "
        yield f"{series.name}: {rest}{_count(len(doubts), 'doubt')} about the fits, listed below."


def _identified(name: str, fit: LawFit) -> Iterator[str]:
    """The exponents that no warning speaks of. A warning about the fit as a whole speaks of all."""
    if any(not one.startswith(("the exponent", "the floor")) for one in fit.warnings):
        return
    for quantity, exponent in zip(fit.names, fit.exponents, strict=True):
        if not any(one.startswith(f"the exponent of {quantity} ") for one in fit.warnings):
            yield f"in {name} the exponent of {quantity.replace('_', ' ')} is {exponent}"


def _numbers(values: Sequence[str]) -> list[float]:
    """The values as numbers; [] where one is none."""
    try:
        return [float(value) for value in values]
    except ValueError:
        return []


def list_values(values: Sequence[str]) -> str:
    """The values of an axis in words, of many the first and the last."""
    if len(values) <= _MOST_VALUES:
        return ", ".join(values)
    return f"{', '.join(values[: _MOST_VALUES - 1])} ... {values[-1]} ({len(values)} values)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
