"""Configurations of the planner's tests, and benchmarks that tests run."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from mf_train.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from tests.training.runs import REPOSITORY, environment

SMALL = ModelConfig(hidden_size=64, num_layers=2, num_heads=4, vocab_size=512, sequence_length=32)


def make_config(
    model: ModelConfig = SMALL,
    batch: int = 4,
    micro: int = 2,
    tensor: int = 1,
    stage: int = 1,
    precision: Any = "float32",
    held: tuple[Any, Any, Any] = ("float32", "float32", "float32"),
) -> Config:
    """On a CPU, with sequences a step and a micro-batch, degrees, stage, precision; moments and masters `held` so."""
    training = TrainingConfig(
        global_batch_size=batch, micro_batch_size=micro, precision=precision, device="cpu"
    )
    first, second, master = held
    return Config(
        model=model,
        training=training,
        optimizer=OptimizerConfig(table_exp_avg=first, table_exp_avg_sq=second),
        parallel=ParallelConfig(tensor=tensor, zero_stage=stage, master=master),
    )


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
