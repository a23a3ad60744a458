"""The arguments of `memoryformer study` and its verbs, and what they call."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mf_train.commands import Run, add_command, add_verbs, print_lines
from mf_train.errors import UserError
from mf_train.launch.arguments import add_job_options, options_from

if TYPE_CHECKING:
    from mf_train.study.cells import Grid
    from mf_train.study.study import Study

_X = ("flops", "bytes_moved", "parameters", "table_parameters", "block_parameters", "tokens")


def add_study(commands: Any) -> None:
    """Add the command to the command line's parser."""
    verbs = add_verbs(commands, "study", "a grid of runs, its results, fits and plots")

    def add_verb(name: str, summary: str, options: str, run: Run) -> argparse.ArgumentParser:
        example = f"study {name} configs/studies/sizes-small.yaml{options}"
        parser = add_command(verbs, name, summary, example, run)
        parser.add_argument("study", type=Path, metavar="STUDY", help="a study's YAML file")
        return parser

    add_verb("plan", "show the cells, what they cost, and what does not fit", "", _plan)

    run = add_verb("run", "run the cells that are not done, here or as a SLURM array", " --at-once 2", _run)
    run.add_argument("--at-once", type=int, metavar="N", help="cells at a time (default: 1; SLURM: all)")
    run.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    run.add_argument("--slurm", action="store_true", help="submit an array, with the options of launch below")
    run.add_argument("--dry-run", action="store_true", help="with --slurm: write the script, submit nothing")
    run.add_argument("--parsable", action="store_true", help="with --slurm: print the job's number alone")
    run.add_argument("--no-report", action="store_true", help="run the cells alone: no table, no report.html")
    _add_fit_options(run)
    add_job_options(run)

    add_verb("collect", "write one table of all cells, results.csv", "", _collect)

    fit = add_verb("fit", "fit and draw what results.csv holds: report.html", " --x bytes_moved", _fit)
    _add_fit_options(fit)

    report = add_verb("report", "collect and fit in one: from the cells' runs to report.html", "", _report)
    _add_fit_options(report)


def _add_fit_options(parser: argparse.ArgumentParser) -> None:
    fits = parser.add_argument_group("tables, plots and fits")
    fits.add_argument(
        "--x",
        choices=_X,
        default="flops",
        help="cost that the loss is drawn and fitted over (default: flops)",
    )
    fits.add_argument(
        "--size",
        choices=_X[2:5],
        default="parameters",
        help="column used as model size N in L(N, D) (default: parameters)",
    )
    by = "columns, each of whose values is a series with fits of its own (default: model.kind)"
    fits.add_argument("--by", default="model.kind", metavar="KEYS", help=by)
    fits.add_argument(
        "--samples", type=int, default=200, metavar="N", help="number of bootstrap samples (default: 200)"
    )


def _open(given: argparse.Namespace) -> tuple[Study, Grid]:
    from mf_train.study.cells import make_grid
    from mf_train.study.study import load_study

    study = load_study(given.study)
    return study, make_grid(study)


def _plan(given: argparse.Namespace) -> int:
    from mf_train.study.plan import plan_lines

    return print_lines(plan_lines(*_open(given)))


def _run(given: argparse.Namespace) -> int:
    from mf_train.exit_status import STOPPED
    from mf_train.study.run import run_here, submit_array

    if given.at_once is not None and given.at_once < 1:
        raise UserError(f"--at-once {given.at_once}: it must be at least 1")
    study, grid = _open(given)
    if given.slurm:
        return submit_array(
            study,
            grid,
            options_from(given),
            given.at_once,
            given.retry_failed,
            dry_run=given.dry_run,
            parsable=given.parsable,
            command=["memoryformer", *sys.argv[1:]],
        )
    if given.dry_run or given.parsable or given.tasks_per_node or given.gpus_per_node:
        raise UserError("options of a job need --slurm; without it the cells run here")
    status = run_here(study, grid, given.at_once or 1, given.retry_failed)
    if status != STOPPED and not given.no_report:
        _report(given)
    return status


def _collect(given: argparse.Namespace) -> int:
    from mf_train.study.collect import collect, write_results

    study, grid = _open(given)
    rows = collect(grid)
    counts = ", ".join(f"{count} {state}" for state, count in Counter(rows["state"]).items())
    return print_lines([f"{write_results(study.folder, rows)}: {len(rows)} cells: {counts}"])


def _fit(given: argparse.Namespace) -> int:
    from mf_train.study.report import fit_study
    from mf_train.study.study import load_study

    if given.samples < 1:
        raise UserError(f"--samples {given.samples}: it must be at least 1")
    study = load_study(given.study)
    order = {axis.name: [value.label for value in axis.values] for axis in study.axes}
    return print_lines(fit_study(study.folder, order, given.x, given.size, given.by, given.samples))


def _report(given: argparse.Namespace) -> int:
    return _collect(given) or _fit(given)
