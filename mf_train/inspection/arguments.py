"""The arguments of `memoryformer inspect`, and what they call."""

import argparse
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, print_lines


def add_inspect(commands: Any) -> None:
    """Add the command to the command line's parser."""
    parser = add_command(
        commands,
        "inspect",
        "how often each row of a trained model's tables is read",
        "inspect runs/quickstart --output quickstart-tables",
        _inspect,
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_MODEL",
        help="a run's folder, a checkpoint or a converted model",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="GLOB",
        help="text, JSONL or Parquet files; may be repeated (default: the run's validation text)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="sequences that are read (default: as many as hold 32 tokens for each row of the largest tables)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="write buckets.png and tables.json into it"
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def _inspect(given: argparse.Namespace) -> int:
    from mf_train.inspection.run import inspect

    return print_lines(inspect(given.source, given.data, given.sequences, given.output, given.json))
