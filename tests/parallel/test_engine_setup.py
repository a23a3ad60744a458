"""How DeepSpeed is set up: it does not wait for the device, and looks for compilers on CPUs alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.micro_batches import backward_passes
from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine
from mf_train.parallel.groups import Groups, start_processes
from mf_train.parallel.processes import find_process
from tests.distributed import run_distributed
from tests.training.runs import REPOSITORY, environment

CPU = torch.device("cpu")
MODEL = ModelConfig(hidden_size=32, num_layers=1, num_heads=4, bits=4, vocab_size=128, sequence_length=16)


def count_waits(rank: int, world_size: int) -> dict[str, int]:
    """How often DeepSpeed synchronises the device in three steps of four micro-batches, by stage and precision."""
    start_processes(find_process(), CPU, 60)
    groups = Groups(Degrees(rank, world_size, 1), 60)
    counts = {}
    for stage, precision in [(3, "float32"), (3, "bfloat16")]:
        config = Config(
            model=MODEL,
            parallel=ParallelConfig(tensor=1, zero_stage=stage),
            training=TrainingConfig(global_batch_size=8, micro_batch_size=2, precision=precision),
        )
        engine = Engine(MemoryFormer(MODEL), config, groups, CPU)
        from deepspeed.accelerator import get_accelerator

        waits = 0

        def note(*_: object) -> None:
            nonlocal waits
            waits += 1

        get_accelerator().synchronize = note
        tokens = torch.randint(MODEL.vocab_size, (2, MODEL.sequence_length + 1))
        for _ in range(3):
            backward_passes(engine, [tokens] * 4, 8)
            engine.update(1e-3)
        counts[f"stage {stage} {precision}"] = waits
    return counts


@pytest.mark.distributed
def test_no_micro_batch_waits_for_the_device() -> None:
    [counts] = run_distributed(count_waits, 1)
    assert set(counts.values()) == {0}, counts


@pytest.mark.parametrize(("kind", "probed"), [("cuda", False), ("cpu", True)])
def test_operators_are_probed_on_cpus_alone(kind: str, probed: bool) -> None:
    code = (
        "import torch\n"
        "from mf_train.parallel.zero3 import import_deepspeed\n"
        f"deepspeed = import_deepspeed(torch.device({kind!r}), 0)\n"
        "print('__compatible_ops__' in vars(deepspeed.ops))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split()[-1:] == [str(probed)], done.stderr
