"""`study fit`: the fits as lines and as JSON, the plots as PNG, and one HTML file that holds all of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mf_train.drawing import render_page
from mf_train.files import write_whole
from mf_train.study.analysis import LOSS, Series, analyse, measure
from mf_train.study.bootstrap import LEVEL, LawFit
from mf_train.study.collect import AXIS, RESULTS, read_results
from mf_train.study.state import DONE, FAILED, MISSING, UNFINISHED
from mf_train.study.summary import NOTE, SUMMARY, LossTable, loss_tables, markdown

if TYPE_CHECKING:
    from pandas import DataFrame

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
    pictures = draw_all(series, measured, x, size)
    (folder / PLOTS).mkdir(exist_ok=True)
    for path in (folder / PLOTS).glob("*.png"):
        if path.stem not in pictures:
            path.unlink()  # of an earlier fit
    fits = {"x": x, "size": size, "by": by, "level": LEVEL, "series": [asdict(one) for one in series]}
    files = {f"{PLOTS}/{name}.png": data for name, data in pictures.items()} | {
        FITS: (json.dumps(_plain(fits), indent=1) + "\n").encode(),
        SUMMARY: markdown(folder.name, tables, notes + lines).encode(),
        REPORT: render(folder.name, rows, lines, notes, tables, pictures).encode(),
    }
    for name, data in files.items():
        write_whole(folder / name, data)
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
        yield from _law_lines("frontier", series.curve)
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


def render(
    name: str,
    rows: DataFrame,
    lines: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[LossTable],
    pictures: Mapping[str, bytes],
) -> str:
    """The report."""
    return render_page(
        _TEMPLATE,
        pictures,
        {"five_digits": _five_digits},
        name=name,
        notes=notes,
        lines=lines,
        level=f"{LEVEL:.0%}",
        table_note=NOTE,
        tables=tables,
        columns=["cell", "state", *(column for column in rows if column.startswith(AXIS)), *_SHOWN],
        rows=rows.to_dict("records"),
    )


def _five_digits(text: str) -> str:
    """A number with five digits; other text as it is."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if text.isdigit() and len(text) < 7 else f"{number:.5g}"
