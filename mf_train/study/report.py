"""`study fit`: the fits as lines and as JSON, the plots as PNG, and one HTML file that holds all of it."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mf_train.files import write_whole
from mf_train.study.analysis import LOSS, Series, analyse, measure
from mf_train.study.bootstrap import LEVEL, LawFit
from mf_train.study.collect import RESULTS, read_results
from mf_train.study.summary import NOTE, SUMMARY, axis_tables, markdown, to_html

REPORT, FITS, PLOTS = "report.html", "fits.json", "plots"


def fit_study(
    folder: Path, order: Mapping[str, Sequence[str]], x: str, size: str, by: str, samples: int
) -> Iterator[str]:
    """Fit what results.csv holds; write fits.json, summary.md, plots and report.html beside it; yield what was found.

    `order`: the values of each axis as the study lists them. What cannot be fitted is said. Raises UserError, OSError.
    """
    from mf_train.study.plots import draw_all

    rows = read_results(folder / RESULTS)
    measured = measure(rows, x, size, by)
    series = analyse(rows, x, size, by, samples)
    notes = list(excluded(rows))
    lines = [line for one in series for line in series_lines(one)]
    tables = axis_tables(measured, order)
    pictures = draw_all(series, measured, x, size)
    (folder / PLOTS).mkdir(exist_ok=True)
    for path in (folder / PLOTS).glob("*.png"):
        if path.stem not in pictures:
            path.unlink()  # of an earlier fit
    for name, data in pictures.items():
        write_whole(folder / PLOTS / f"{name}.png", data)
    fits = {"x": x, "size": size, "by": by, "level": LEVEL, "series": [asdict(one) for one in series]}
    write_whole(folder / FITS, (json.dumps(_plain(fits), indent=1) + "\n").encode())
    write_whole(folder / SUMMARY, markdown(folder.name, tables, notes + lines).encode())
    page = render(folder.name, rows, lines, notes, to_html(tables), pictures)
    write_whole(folder / REPORT, page.encode())
    yield from notes
    yield from lines
    yield f"{folder / REPORT}, {SUMMARY}, {FITS}: {len(tables)} tables, {len(pictures)} plots"


def excluded(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """What the tables and fits leave out: cells that are not done, and those without a loss."""
    for row in rows:
        if row["state"] == "failed":
            yield f"left out: cell {row['cell']} failed at step {row['step']}: {row['reason']}"
        elif row["state"] == "done" and not row[LOSS]:
            yield f"left out: cell {row['cell']} has no validation loss: set training.validation_interval"
        elif row["state"] == "done" and not math.isfinite(float(row[LOSS])):
            yield f"left out: the loss of cell {row['cell']} is {row[LOSS]}"
    if waiting := sum(row["state"] in ("missing", "unfinished") for row in rows):
        yield f"left out: {waiting} cells that are not done; run memoryformer study run"
    if not any(row["state"] == "done" for row in rows):
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


_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: .15rem .6rem; border-bottom: 1px solid #ddd; }
td { text-align: right; } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; } img { max-width: 100%; }
.scroll { overflow-x: auto; } .failed { background: #fdd; } .missing, .unfinished { color: #888; }
"""
_SHOWN = ("final_validation_loss", "best_validation_loss", "tokens", "flops", "bytes_moved", "parameters",
          "table_parameters", "seconds", "reason")  # fmt: skip


def render(
    name: str,
    rows: Sequence[dict[str, str]],
    lines: Sequence[str],
    notes: Sequence[str],
    tables: str,
    pictures: dict[str, bytes],
) -> str:
    """The report: nothing in it is fetched from elsewhere."""
    columns = ["cell", "state", *(key for key in rows[0] if key.startswith("axis.")), *_SHOWN]
    head = "".join(
        f"<th>{html.escape(column.removeprefix('axis.').replace('_', ' '))}</th>" for column in columns
    )
    body = "".join(
        f'<tr class="{html.escape(row["state"])}">'
        + "".join(f"<td>{html.escape(_short(row[column]))}</td>" for column in columns)
        + "</tr>\n"
        for row in rows
    )
    images = "".join(
        f"<h2>{html.escape(title.replace('-', ' ').replace('_', ' '))}</h2>\n"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">\n'
        for title, data in pictures.items()
    )
    note = (
        f"Brackets: {LEVEL:.0%} of a bootstrap over configurations and over the seeds of each; of best sizes, their "
        "losses and their growth over the seeds alone. "
        "Losses: of the validation text after the last step, nats a token. FLOPs: of training, 6 for "
        "each multiply-add of a forward pass (model_flops in metrics.jsonl). Bytes: what the kernels read and write, "
        "computed as for bytes_moved in metrics.jsonl."
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{html.escape(name)}</h1>\n"
        + "".join(f"<p>{html.escape(one)}</p>\n" for one in notes)
        + f"<h2>fits</h2>\n<pre>{html.escape(chr(10).join(lines))}</pre>\n<p>{note}</p>\n{images}"
        f"<h2>losses by axis</h2>\n<p>{html.escape(NOTE)}</p>\n{tables}"
        f'<h2>cells</h2>\n<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>\n</body></html>\n'
    )


def _short(text: str) -> str:
    """A number with five digits."""
    try:
        number = float(text)
    except ValueError:
        return text
    return text if text.isdigit() and len(text) < 7 else f"{number:.5g}"
