"""The arguments of `memoryformer doctor`, of which there are none, and what it calls."""

import argparse
from typing import Any

from mf_train.commands import add_command, print_lines


def add_doctor(commands: Any) -> None:
    """Add the command to the command line's parser."""
    add_command(commands, "doctor", "what this machine has and what would make it faster", "doctor", _doctor)


def _doctor(given: argparse.Namespace) -> int:
    from mf_train.doctor.doctor import doctor

    return print_lines(doctor())
