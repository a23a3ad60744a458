"""The arguments of `memoryformer quickstart`, and what it calls."""

import argparse
from typing import Any

from mf_train.commands import add_command


def add_quickstart(commands: Any) -> None:
    """Add the command to the command line's parser."""
    summary = (
        "train a small model on the shipped text, convert it, generate, draw its curves (minutes on 2 cores)"
    )
    parser = add_command(commands, "quickstart", summary, "quickstart training.steps=100", _quickstart)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that replace configs/quickstart.yaml's",
    )


def _quickstart(given: argparse.Namespace) -> int:
    from mf_train.quickstart.run import quickstart

    return quickstart(given.overrides)
