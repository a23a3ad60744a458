"""How a command is put on the command line: every one has a summary and an example."""

import argparse
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, summary: str, example: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    """Add a command to `commands` (`add_subparsers`' result); `run` does it and returns the exit status."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example: {example}",
    )
    parser.set_defaults(run=run)
    return parser
