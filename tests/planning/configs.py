"""Configurations of the planner's tests, and benchmarks that tests run."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from tests.training.runs import REPOSITORY, environment

SMALL = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=512, sequence_length=32)


def make_config(
    model: ModelConfig = SMALL,
    batch: int = 4,
    micro: int = 2,
    tensor: int = 1,
    stage: int = 1,
    precision: Any = "float32",
) -> Config:
    """On a CPU, with sequences a step and a micro-batch, degrees, stage and precision."""
    training = TrainingConfig(
        global_batch_size=batch, micro_batch_size=micro, precision=precision, device="cpu"
    )
    return Config(model=model, training=training, parallel=ParallelConfig(tensor=tensor, zero_stage=stage))


def run_python(*arguments: str, **variables: str) -> str:
    """What `python ARGUMENTS` prints, on one thread and with these variables."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**environment(), **variables},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
