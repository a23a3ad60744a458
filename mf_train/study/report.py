"""`study fit`: conclusions, fits as lines and as JSON, plots as PNG, and one HTML file that holds all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mf_train.drawing import render_page
from mf_train.files import write_whole
from mf_train.run_folder import read_metrics
from mf_train.study.analysis import Series, analyse, measure
from mf_train.study.bootstrap import LEVEL, Interval, LawFit
from mf_train.study.collect import AXIS, LOSS, RESULTS, read_results
from mf_train.study.conclusions import conclude, list_values
from mf_train.study.state import DONE, FAILED, MISSING, UNFINISHED
from mf_train.study.summary import NOTE, SUMMARY, LossTable, loss_tables, markdown

if TYPE_CHECKING:
    from pandas import DataFrame

    from mf_train.study.plots import Curves, Picture

REPORT, FITS, PLOTS = "report.html", "fits.json", "plots"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def fit_study(
    folder: Path, order: Mapping[str, Sequence[str]], x: str, size: str, by: str, samples: int
) -> Iterator[str]:
    """Fit what results.csv holds; write fits.json, summary.md, plots and report.html beside it; yield what was found.

    `order`: the values of each axis as the study lists them. What cannot be fitted is said. Raises UserError, OSError.
    """
    from mf_train.study.plots import draw_all

    rows = read_results(folder / RESULTS)
    measured = measure(rows, x, size, by)
    series = analyse(measured, x, size, samples)
    notes = list(excluded(rows))
    lines = [line for one in series for line in series_lines(one)]
    tables = loss_tables(measured, order)
    conclusions = list(conclude(series, measured, order, x))
    curves = {cell: curve for one in measured for cell in one.cells if (curve := read_curve(folder, cell))}
    pictures = draw_all(series, measured, x, size, curves)
    (folder / PLOTS).mkdir(exist_ok=True)
    for path in (folder / PLOTS).glob("*.png"):
        if path.stem not in pictures:
            path.unlink()  # of an earlier fit
    fits = {"x": x, "size": size, "by": by, "level": LEVEL, "series": [asdict(one) for one in series]}
    page = render(folder.name, rows, series, conclusions, notes, tables, pictures)
    files = {f"{PLOTS}/{name}.png": picture.png for name, picture in pictures.items()} | {
        FITS: (json.dumps(_plain(fits), indent=1) + "\n").encode(),
        SUMMARY: markdown(folder.name, tables, notes + lines, conclusions).encode(),
        REPORT: page.encode(),
    }
    for name, data in files.items():
        write_whole(folder / name, data)
    yield from conclusions
    yield from notes
    yield from lines
    yield f"{folder / REPORT}, {SUMMARY}, {FITS}: {len(tables)} tables, {len(pictures)} plots"


def excluded(rows: DataFrame) -> Iterator[str]:
    """What the tables and fits leave out: cells that are not done, and those without a loss."""
    for row in rows.to_dict("records"):
        if row["state"] == FAILED:
            yield f"left out: cell {row['cell']} failed at step {row['step']}: {row['reason']}"
        elif row["state"] == DONE and not row[LOSS]:
            yield f"left out: cell {row['cell']} has no validation loss: set training.validation_interval"
        elif row["state"] == DONE and not math.isfinite(float(row[LOSS])):
            yield f"left out: the loss of cell {row['cell']} is {row[LOSS]}"
    if waiting := rows["state"].isin([MISSING, UNFINISHED]).sum():
        yield f"left out: {waiting} cells that are not done; run memoryformer study run"
    if DONE not in rows["state"].values:
        yield "nothing to show yet: no cell is done"


def _plain(value: Any) -> Any:
    """For JSON, which has no NaN: the bounds of an interval that could not be drawn are null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def series_lines(series: Series) -> Iterator[str]:
    """What was fitted for a series, and each doubt."""
    seeds = sum(len(one.losses) for one in series.measured)
    yield f"{series.name}: {len(series.measured)} configurations, {seeds} runs" + (
        f"; {series.tuned_away} more configurations of the same size and tokens had a higher loss"
        if series.tuned_away
        else ""
    )
    if series.surface:
        yield from _law_lines("L(N, D)", series.surface)
    if series.curve:
        yield from _law_lines("Pareto frontier", series.curve)
    if series.isoflop:
        minima = series.isoflop.parabolas, series.isoflop.best, series.isoflop.lowest
        for one, best, lowest in zip(*minima, strict=True):
            mark = "" if one.inside else " (outside the sizes that were run)"
            yield f"  budget {one.budget:.3g}: best size {best}, loss {lowest.text(5)}{mark}"
        if series.isoflop.exponent:
            yield f"  best size grows as budget ** {series.isoflop.exponent}"
        for warning in series.isoflop.warnings:
            yield f"  warning: {warning}"
    for warning in series.warnings:
        yield f"  {warning}"


def _law_lines(name: str, fit: LawFit) -> Iterator[str]:
    yield f"  {name}: floor {fit.floor}, mean error {fit.law.error:.2%}, {fit.points} configurations, {fit.runs} runs"
    for quantity, exponent, coefficient in zip(fit.names, fit.exponents, fit.coefficients, strict=True):
        yield f"    {quantity}: exponent {exponent}, coefficient {coefficient}"
    for warning in fit.warnings:
        yield f"    warning: {warning}"


_SHOWN = ("final_validation_loss", "best_validation_loss", "tokens", "flops", "bytes_moved", "parameters",
          "table_parameters", "seconds", "reason")  # fmt: skip
_UNITS = {
    "seconds": "s",
    "bytes_moved": "B",
    "final_validation_loss": "nats per token",
    "best_validation_loss": "nats per token",
}


def render(
    name: str,
    rows: DataFrame,
    series: Sequence[Series],
    conclusions: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[LossTable],
    pictures: Mapping[str, Picture],
) -> str:
    """The report."""
    axes = [column for column in rows if column.startswith(AXIS)]
    states = rows["state"].value_counts()
    return render_page(
        _TEMPLATE,
        {key: picture.png for key, picture in pictures.items()},
        {"five_digits": _five_digits, "is_numeric": _is_numeric, "column_name": _column_name},
        name=name,
        conclusions=conclusions,
        notes=notes,
        axes=[[axis.removeprefix(AXIS), list_values(list(dict.fromkeys(rows[axis])))] for axis in axes],
        states=f"{len(rows)} cells: {', '.join(f'{count} {state}' for state, count in states.items())}",
        described=pictures,
        laws=[row for one in series for row in _law_rows(one)],
        minima=[row for one in series for row in _minimum_rows(one)],
        doubts=[(one.name, doubt) for one in series for doubt in _doubts(one)],
        level=f"{LEVEL:.0%}",
        table_note=NOTE,
        tables=tables,
        columns=["cell", "state", *axes, *_SHOWN],
        rows=rows.to_dict("records"),
    )


def read_curve(folder: Path, cell: str) -> Curves | None:
    """The validation losses of a cell's run over its tokens, where it has three, or else its training losses.

    None where the run has gone. Raises OSError.
    """
    from mf_train.study.plots import Curves

    records = [one for one in read_metrics(folder / f"cell-{cell}") if one.get("tokens")]
    for name in ("validation_loss", "loss"):
        known = [(one["tokens"], one[name]) for one in records if isinstance(one.get(name), float)]
        if len(known) >= 3:
            tokens, losses = zip(*known, strict=True)
            return Curves(tokens, losses, name == "validation_loss")
    return None


def _law_rows(series: Series) -> Iterator[list[str]]:
    for name, fit in (("L(N, D)", series.surface), ("Pareto frontier", series.curve)):
        if fit:
            yield [
                series.name,
                name,
                str(fit.floor),
                _by_quantity(fit.names, fit.exponents),
                _by_quantity(fit.names, fit.coefficients),
                f"{fit.law.error:.2%}",
                str(fit.points),
                str(fit.runs),
            ]


def _by_quantity(names: Sequence[str], values: Sequence[Interval]) -> str:
    return "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in zip(names, values, strict=True))


def _minimum_rows(series: Series) -> Iterator[list[str]]:
    if found := series.isoflop:
        for one, best, lowest in zip(found.parabolas, found.best, found.lowest, strict=True):
            yield [series.name, f"{one.budget:.3g}", str(best), lowest.text(5), "yes" if one.inside else "no"]


def _doubts(series: Series) -> Iterator[str]:
    """All that speaks against the fits of a series, and why some are missing."""
    yield from series.warnings
    for name, fit in (("L(N, D)", series.surface), ("Pareto frontier", series.curve)):
        if fit:
            yield from (f"{name}: {warning}" for warning in fit.warnings)
    if series.isoflop:
        yield from series.isoflop.warnings


def _column_name(column: str) -> str:
    name = column.removeprefix(AXIS).replace("_", " ")
    return f"{name} ({_UNITS[column]})" if column in _UNITS else name


def _is_numeric(text: str) -> bool:
    """Whether a text begins with a number, as the page sorts them."""
    return text.lstrip("+-")[:1].isdigit()


def _five_digits(text: str) -> str:
    """A number with five digits; other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if text.isdigit() and len(text) < 7 else f"{number:.5g}"
