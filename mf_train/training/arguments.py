"""The arguments of `memoryformer train`, and what it calls."""

import argparse
import os
from typing import Any

from mf_train.commands import add_command, add_config


def add_train(commands: Any) -> None:
    """Add the command to the command line's parser."""
    example = "train configs/quickstart.yaml parallel.tensor=1 training.steps=100"
    add_config(add_command(commands, "train", "pretrain a model", example, _train))


def _train(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.parallel.processes import find_process
    from mf_train.training.environment import set_allocator

    config = load_config(given.config, given.overrides)
    process = find_process()
    if config.training.device != "cpu":
        set_allocator(os.environ)  # torch reads it when it is imported, which comes next

    from mf_train.training.run import train

    return train(config, process)
