"""The arguments of `memoryformer train`, and what it calls."""

import argparse
import os
from pathlib import Path
from typing import Any

from mf_train.commands import add_command, add_config


def add_train(commands: Any) -> None:
    """Add the command to the command line's parser."""
    example = "train configs/quickstart.yaml parallel.tensor=1 training.steps=100"
    add_config(add_command(commands, "train", "pretrain a model", example, _train))


def _train(given: argparse.Namespace) -> int:
    from mf_train.config.loading import load_config
    from mf_train.parallel.processes import find_process
    from mf_train.training.environment import set_allocator, set_flight_recorder, set_waiting

    config = load_config(given.config, given.overrides)
    process = find_process()
    # torch reads these when it is imported, which comes next
    set_flight_recorder(os.environ, Path(config.training.output_dir) / "stacks" / "collectives-")
    if config.training.device != "cpu":
        set_allocator(os.environ)
    if config.training.device != "cuda" and process.world_size == 1 and (told := set_waiting(os.environ)):
        print(told, flush=True)

    from mf_train.training.run import train

    return train(config, process)
