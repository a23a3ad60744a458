"""From the table of results to fits: seeds together, the best of what was tuned, laws, IsoFLOP minima."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mf_train.errors import UserError
from mf_train.study.bootstrap import (
    LEVEL,
    SAMPLES,
    Interval,
    LawFit,
    Point,
    bootstrap_value,
    expand,
    fit_with_intervals,
    interval,
    over_seeds,
)
from mf_train.study.collect import AXIS, LOSS
from mf_train.study.fit import Parabola, fit_parabola, fit_power
from mf_train.study.state import DONE

if TYPE_CHECKING:
    from pandas import DataFrame

SEED_AXIS = f"{AXIS}seed"
SHAPE = ("model.num_layers", "model.hidden_size")  # what makes one model's sizes
_SAME_BUDGET = 1.1  # runs whose costs differ by less than this factor are of one budget


@dataclass(frozen=True)
class Measured:
    """One configuration with the losses of its seeds."""

    series: str
    axes: dict[str, str]  # without the seed
    size: float
    tokens: float
    x: float
    losses: tuple[float, ...]
    seeds: tuple[str, ...]  # of each loss
    cells: tuple[str, ...]
    parameters: float
    flops: float
    shape: tuple[str, ...]  # values of SHAPE

    @property
    def mean(self) -> float:
        return sum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class IsoFlop:
    """Parabolas of the budgets, and how their best sizes grow with the budget."""

    parabolas: tuple[Parabola, ...]
    best: tuple[Interval, ...]  # size of each parabola's minimum, over the seeds
    lowest: tuple[Interval, ...]  # its loss, nats
    exponent: Interval | None  # p of best size ~ budget ** p
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Series:
    """All fits of one series, such as of one model kind."""

    name: str
    measured: tuple[Measured, ...]  # best of what was tuned at each size and length
    tuned_away: int  # configurations that another one of the same size and length beat
    surface: LawFit | None  # L(N, D)
    curve: LawFit | None  # of the Pareto frontier
    isoflop: IsoFlop | None
    warnings: tuple[str, ...]  # why a fit is missing


def measure(rows: DataFrame, x: str, size: str, by: str) -> list[Measured]:
    """Done cells, with the seeds of one configuration together. Raises UserError."""
    from pandas import to_numeric

    if rows.empty:
        raise UserError("the table of results has no cells")
    keys = by.split(",")
    for name in (x, size, *keys):
        if name not in rows:
            raise UserError(f"the table of results has no column {name}: see its first line for those it has")
    # the axes say what differs; a seed is no configuration of its own
    axes = [name for name in rows if name.startswith(AXIS) and name != SEED_AXIS]
    done = rows[(rows["state"] == DONE) & np.isfinite(to_numeric(rows[LOSS], errors="coerce"))]
    found = []
    for _, group in done.groupby(list(dict.fromkeys([*keys, size, "tokens", *axes])), sort=False):
        first = group.iloc[0]
        found.append(
            Measured(
                series=" ".join(first[keys]),
                axes={name.removeprefix(AXIS): first[name] for name in axes},
                size=float(first[size]),
                tokens=float(first["tokens"]),
                x=float(group[x].map(float).mean()),  # of seeds, where runs measured it
                losses=tuple(map(float, group[LOSS])),
                seeds=tuple(group.get(SEED_AXIS, [""] * len(group))),
                cells=tuple(group["cell"]),
                parameters=float(first["parameters"]),
                flops=float(first["flops"]),
                shape=tuple(first.get(name, "") for name in SHAPE),
            )
        )
    return found


def analyse(measured: Sequence[Measured], x: str, size: str, samples: int = SAMPLES) -> list[Series]:
    """Fits of each series; none where no cell is done."""
    names = dict.fromkeys(one.series for one in measured)
    return [
        _series(name, [one for one in measured if one.series == name], x, size, samples) for name in names
    ]


def _series(name: str, measured: Sequence[Measured], x: str, size: str, samples: int) -> Series:
    best = _best(measured)
    warnings: list[str] = []
    surface = curve = isoflop = None
    if len({(one.size, one.tokens) for one in best}) == 1:
        reason = "nothing to fit: all configurations have one size and one number of tokens"
        return Series(name, tuple(best), len(measured) - len(best), None, None, None, (reason,))
    try:
        points = [Point((one.size, one.tokens), one.losses) for one in best]
        surface = fit_with_intervals(points, (size, "tokens"), samples)
    except ValueError as error:
        warnings.append(f"no L(N, D): {error}")
    try:
        points = [Point((one.x,), one.losses) for one in frontier(best)]
        curve = fit_with_intervals(points, (x,), samples)
    except ValueError as error:
        warnings.append(f"no loss over {x}: {error} (only the Pareto frontier counts)")
    if x in ("flops", "bytes_moved"):
        wide = [group for group in _same_budget(best) if len({one.size for one in group}) >= 3]
        groups = budgets(best)
        if not wide:
            warnings.append(f"no parabolas: no budget of {x} has three sizes")
        elif len(groups) < len(wide):
            warnings.append(
                f"{len(wide) - len(groups)} of {len(wide)} budgets have no parabola: {size} differ there by more than "
                f"{' and '.join(SHAPE)}, which a best size is about (--by parts a series)"
            )
        isoflop = fit_isoflop(groups, samples) if groups else None
    return Series(name, tuple(best), len(measured) - len(best), surface, curve, isoflop, tuple(warnings))


def frontier(measured: Sequence[Measured]) -> list[Measured]:
    """The Pareto frontier: the best of each budget, where no smaller budget has a better one; smallest x first."""
    found: list[Measured] = []
    for group in _same_budget(measured):
        one = min(group, key=lambda one: one.mean)
        if not found or one.mean < found[-1].mean:
            found.append(one)
    return found


def _best(measured: Sequence[Measured]) -> list[Measured]:
    """At each size and number of tokens the configuration with the lowest mean loss: the others were tuning."""
    found: dict[tuple[float, float], Measured] = {}
    for one in measured:
        place = one.size, one.tokens
        found[place] = min(found.get(place, one), one, key=lambda one: one.mean)
    return list(found.values())


def budgets(measured: Sequence[Measured]) -> list[list[Measured]]:
    """Configurations of about one x, where they are three sizes of one model or more; smallest x first."""
    found = []
    for group in _same_budget(measured):
        sizes = {(one.size, one.shape) for one in group}
        # a size that comes from the bits of the tables, say, is a setting's and has no best value of its own
        if len(sizes) >= 3 and len({shape for _, shape in sizes}) == len(sizes):
            found.append(group)
    return found


def _same_budget(measured: Sequence[Measured]) -> list[list[Measured]]:
    """Whole steps and seeds leave runs of one budget with slightly different costs."""
    groups: list[list[Measured]] = []
    for one in sorted(measured, key=lambda one: one.x):
        if groups and one.x <= groups[-1][0].x * _SAME_BUDGET:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def fit_isoflop(groups: Sequence[Sequence[Measured]], samples: int = SAMPLES) -> IsoFlop:
    """Parabolas of `budgets`, with intervals over the seeds and what speaks against them."""
    parabolas: list[Parabola] = []
    best: list[Interval] = []
    lowest: list[Interval] = []
    warnings: list[str] = []
    for group in groups:
        points = [Point((one.size, one.x), one.losses) for one in group]
        try:
            found = _parabola(points)
        except ValueError as error:
            warnings.append(str(error))
            continue
        drawn = over_seeds(points, _parabola, samples)
        parabolas.append(found)
        best.append(interval(found.best, [one.best for one in drawn]))
        lowest.append(interval(found.lowest, [one.lowest for one in drawn]))
        if doubt := _doubt(found, best[-1], [one.size for one in group], len(drawn), samples):
            warnings.append(f"budget {found.budget:.3g}: {doubt}")
    exponent = None
    if sum(one.inside for one in parabolas) >= 2:
        points = [
            Point((one.size, one.x, index), one.losses) for index, group in enumerate(groups) for one in group
        ]
        exponent = bootstrap_value(points, _best_size_exponent, samples)
        width = exponent.high - exponent.low
        if not width <= abs(exponent.value):
            warnings.append(
                f"the exponent {exponent} of the best size is not identified: its interval over the seeds is "
                f"{'missing, with one seed a configuration' if width != width else 'wider than it'}"
            )
    else:
        warnings.append(
            "fewer than two budgets have their minimum inside: how the best size grows is not known"
        )
    return IsoFlop(tuple(parabolas), tuple(best), tuple(lowest), exponent, tuple(warnings))


def _doubt(found: Parabola, best: Interval, sizes: Sequence[float], drawn: int, samples: int) -> str:
    """Why a budget's best size is not known; '' where nothing speaks against it."""
    if not found.inside:
        return f"the best size {best} lies outside the sizes that were run"
    if not drawn:
        return f"the best size {best} has no interval: that needs two seeds"
    if best.low < min(sizes) or best.high > max(sizes):
        return (
            f"the best size {best} is not identified: its interval over the seeds extends beyond the sizes that "
            f"were run, {min(sizes):.4g} to {max(sizes):.4g}"
        )
    if drawn < (1 + LEVEL) / 2 * samples:
        return (
            f"the best size {best} is not identified: {samples - drawn} of {samples} samples have no minimum"
        )
    return ""


def _best_size_exponent(points: Sequence[Point]) -> float:
    """Raises ValueError where fewer than two budgets have a minimum inside their sizes."""
    groups: defaultdict[float, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.x[2]].append(point)
    found = []
    for group in groups.values():
        try:
            one = _parabola(group)
        except ValueError:
            continue
        if one.inside:
            found.append(one)
    return fit_power([one.budget for one in found], [one.best for one in found])[1]


def _parabola(points: Sequence[Point]) -> Parabola:
    x, loss = expand(points)
    return fit_parabola(float(x[:, 1].mean()), x[:, 0], loss)
