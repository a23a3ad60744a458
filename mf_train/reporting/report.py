"""`memoryformer report`: what a run's folder tells, as one HTML file with its pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from mf_train.checkpoint.verify import list_lines
from mf_train.drawing import render_page
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.launch.launch_folder import read_starts
from mf_train.reporting.history import Curve, History, read_history
from mf_train.reporting.panels import draw
from mf_train.run_folder import CONFIG, METRICS
from mf_train.text import time_left

REPORT = "report.html"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_MOST_EVENTS = 200  # the newest that are listed


def report(run: Path, output: Path | None = None) -> Iterator[str]:
    """Write the page of a run, by default into its folder; yields a line on it. Raises UserError and OSError."""
    output = run / REPORT if output is None else output
    if not (run / METRICS).is_file():
        raise UserError(f"{run}: has no {METRICS}: name the folder of a run (its training.output_dir)")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}: make it first")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder: name a file in it")
    history = read_history(run)
    if not history.last:
        raise UserError(f"{run}: {METRICS} holds no step yet: wait for the first one")
    page = render(run, history)
    write_whole(output, page.encode())
    yield f"{output}: {history.last['step']:,} steps, {page.count('<img ')} pictures, {len(page) / 1e6:.1f} MB"


def render(run: Path, history: History) -> str:
    """The page."""
    return render_page(
        _TEMPLATE,
        draw(history),
        run=run,
        facts=list(facts(history)),
        events=history.events[-_MOST_EVENTS:],
        left_out=max(0, len(history.events) - _MOST_EVENTS),
        starts=read_starts(run),
        checkpoints=list(_checkpoints(run)),
        config=_text(run / CONFIG),
    )


def facts(history: History) -> Iterator[tuple[str, str]]:
    """Names and values of the table at the top."""
    last, curves = history.last, history.curves
    yield "step", f"{last['step']:,}"
    yield "tokens", f"{last.get('tokens', 0):,}"
    if curve := curves.get("loss"):
        yield "loss", f"{curve.values[-1]:.4f}"
    for name, curve in curves.items():
        if name.startswith("validation") and "loss" in name:
            best, step = min((value, step) for value, step in zip(curve.values, curve.steps, strict=True))
            yield (
                name.replace("_", " "),
                f"{curve.values[-1]:.4f} after step {curve.steps[-1]:,}; least {best:.4f} after step {step:,}",
            )
    if curve := curves.get("step_seconds"):
        total = math.fsum(curve.values)
        yield "time in steps", time_left(total)
        yield "tokens a second", f"{last.get('tokens', 0) / total:,.0f} on average"
        waited = math.fsum(curves.get("data_wait_seconds", Curve()).values)
        yield "waited for data", f"{waited / total:.1%} of it"
    for kind, name in (("resumed", "restarts"), ("skipped", "steps skipped"), ("alarm", "alarms of tables")):
        if count := sum(event.kind == kind for event in history.events):
            yield name, str(count)


def _checkpoints(run: Path) -> Iterator[str]:
    try:
        yield from list_lines(run)
    except UserError:
        yield "none"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
