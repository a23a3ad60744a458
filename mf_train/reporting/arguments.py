"""The arguments of `memoryformer report`, and what it calls."""

import argparse
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, print_lines


def add_report(commands: Any) -> None:
    """Add the command to the command line's parser."""
    summary = "one HTML page with a run's curves, restarts and checkpoints"
    parser = add_command(commands, "report", summary, "report runs/quickstart", _report)
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder; it may still train")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="where the page is written (default: RUN/report.html)"
    )


def _report(given: argparse.Namespace) -> int:
    from mf_train.reporting.report import report

    return print_lines(report(given.run_folder, given.output))
