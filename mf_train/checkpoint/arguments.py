"""The arguments of `memoryformer checkpoint`, and what they call."""

import argparse
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, add_verbs, print_lines


def add_checkpoint(commands: Any) -> Any:
    """Add the command to the command line's parser; returns what `add_command` takes to add another verb of it."""
    verbs = add_verbs(commands, "checkpoint", "look at a run's checkpoints")
    summary = "read checkpoints and compare every checksum"
    verb = add_command(verbs, "verify", summary, "checkpoint verify runs/quickstart", _verify)
    verb.add_argument(
        "path", type=Path, metavar="PATH", help="a checkpoint, or a run's folder: all its checkpoints"
    )
    summary = "show a run's checkpoints: step, size, date"
    verb = add_command(verbs, "list", summary, "checkpoint list runs/quickstart", _list)
    verb.add_argument("run_folder", type=Path, metavar="RUN", help="a run's folder")
    return verbs


def _verify(given: argparse.Namespace) -> int:
    from mf_train.checkpoint.verify import verify

    return print_lines(verify(given.path))


def _list(given: argparse.Namespace) -> int:
    from mf_train.checkpoint.verify import list_lines

    return print_lines(list_lines(given.run_folder))
