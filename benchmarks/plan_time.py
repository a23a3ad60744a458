"""Step times that the planner predicts against those measured, on one thread of this machine.

Run alone: `python -m benchmarks.plan_time [--calibrate] [--save]`. The machine may be busy: a process of one thread and
no data parallelism is timed by its CPU seconds (time.process_time), the least of its steps. `--calibrate` measures the
rates of devices.yaml's `cpu` by operations of other sizes than those of the ranked configurations, and prints them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from benchmarks import machine
from benchmarks.tables import table
from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.planning.devices import find_device
from mf_train.planning.time import estimate_step

STEPS = 3  # of each configuration; the first warms up


def make(model: ModelConfig, batch: int, micro: int, stage: int, precision: str = "float32") -> Config:
    training = TrainingConfig(
        global_batch_size=batch,
        micro_batch_size=micro,
        precision=precision,  # type: ignore[arg-type]
        device="cpu",
    )
    return Config(model=model, training=training, parallel=ParallelConfig(zero_stage=stage))


SMALL = ModelConfig(hidden_size=64, num_layers=2, num_heads=2, bits=4, vocab_size=1024, sequence_length=128)
WIDE = replace(SMALL, hidden_size=256, num_heads=4, bits=8, vocab_size=2048)
# What is ranked; the longest part differs. Predictions lie a factor of 1.5 or more apart.
CONFIGS = {
    "tau 4, one block": make(replace(SMALL, num_layers=1), 1, 1, 0),
    "tau 2, 6 blocks": make(replace(SMALL, num_layers=6, bits=2, sequence_length=64), 2, 2, 1),
    "dense, 4 micro-batches": make(replace(SMALL, kind="dense", hidden_size=128), 8, 2, 1),
    "tau 4, long rows": make(
        replace(SMALL, hidden_size=96, bits=4, num_layers=6, sequence_length=768), 2, 2, 1
    ),
    "tau 8, wide": make(replace(WIDE, num_layers=5), 2, 2, 0),
    "tau 8, wide, bfloat16, 8 micro-batches": make(WIDE, 16, 2, 2, "bfloat16"),
}


def measure_all(configs: dict[str, Config]) -> Iterator[tuple[str, float]]:
    """Names and CPU seconds of a step: the least of those after the first, of training on random tokens."""
    import torch

    from benchmarks.micro_batches import backward_passes
    from mf_train.model import MemoryFormer
    from mf_train.model.initialise import initialise
    from mf_train.parallel.degrees import Degrees
    from mf_train.parallel.engine import Engine
    from mf_train.parallel.groups import Groups, start_processes, stop_processes
    from mf_train.parallel.processes import Process
    from mf_train.training.device import keep_freed_memory

    cpu = torch.device("cpu")
    torch.set_num_threads(1)
    start_processes(Process(), cpu, 600)
    groups = Groups(Degrees(0, 1, 1), 600)
    keep_freed_memory()  # as the trainer does
    for name, config in configs.items():
        model = MemoryFormer(config.model)
        initialise(model, 0)
        engine = Engine(model, config, groups, cpu)
        rows, length = config.training.global_batch_size, config.model.sequence_length
        seconds = []
        for _ in range(STEPS):
            began = time.process_time()
            batch = torch.randint(config.model.vocab_size, (rows, length + 1))
            backward_passes(engine, batch.tensor_split(engine.micro_batches), rows)
            engine.update(1e-4)
            seconds.append(time.process_time() - began)
        yield name, min(seconds[1:])
        del model, engine
    stop_processes()


def calibrate() -> dict[str, float]:
    """Rates of one thread: long passes, rows of tables, products, one small operation."""
    import torch
    import torch.nn.functional as F

    from mf_train.kernels import lookup

    torch.set_num_threads(1)
    found = {}
    a, b = torch.randn(48_000_000), torch.empty(48_000_000)
    found["copy"] = 2 * a.nbytes / _least(lambda: b.copy_(a))
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, w = torch.randn(768, 384, dtype=dtype), torch.randn(1152, 384, dtype=dtype)
        found[f"flops.{name}"] = 2 * 768 * 384 * 1152 / _least(lambda x=x, w=w: F.linear(x, w))
        # forward and backward of a lookup, 96 tables of 64 rows and 96 columns, without its tables' passes
        codes = torch.randint(64, (1536, 96), dtype=torch.uint8)
        weights = torch.rand(1536, 96, dtype=dtype, requires_grad=True)
        tables = torch.randn(96, 64, 96, dtype=dtype, requires_grad=True)
        bias = torch.zeros(96, dtype=dtype, requires_grad=True)

        def both(codes=codes, weights=weights, tables=tables, bias=bias) -> None:  # type: ignore[no-untyped-def]
            lookup(codes, weights, tables, bias).sum().backward()

        rest = 3 * tables.nbytes / found["copy"]
        found[f"gather.{name}"] = 2 * 1536 * 96 * 96 * tables.element_size() / (_least(both) - rest)
    # a model so small that nothing but its operations takes time
    tiny = replace(SMALL, hidden_size=16, bits=2, vocab_size=64, sequence_length=4, num_layers=6)
    config = make(tiny, 1, 1, 1)
    none = replace(find_device("cpu"), launch=1.0)
    launches = round(estimate_step(config, 1, 1, none).seconds)  # at a second each
    ((_, found["launch"]),) = measure_all({"tiny": config})
    found["launch"] /= launches
    return found


def _least(call: Callable[[], object]) -> float:
    """The least CPU seconds of several calls."""
    seconds = []
    for _ in range(8):
        began = time.process_time()
        call()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_time", description=__doc__)
    parser.add_argument("--calibrate", action="store_true", help="print the rates of one thread")
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/DATE-plan-time.txt"
    )
    given = parser.parse_args()
    if given.calibrate:
        for name, rate in calibrate().items():
            print(f"{name:<16} {rate:.3g}")
        return
    device = find_device("cpu")
    rows, pairs = [], []
    for name, measured in measure_all(CONFIGS):
        predicted = estimate_step(CONFIGS[name], 1, 1, device)
        print(name, predicted.seconds, measured, file=sys.stderr, flush=True)
        pairs.append((predicted.seconds, measured))
        largest = max(predicted.parts, key=lambda part: part.seconds).name
        rows.append(
            [
                name,
                f"{predicted.seconds:.3f}",
                f"{measured:.3f}",
                f"{predicted.seconds / measured:.2f}",
                largest,
            ]
        )
    by_time = sorted(range(len(pairs)), key=lambda one: pairs[one][1])
    order = sorted(range(len(pairs)), key=lambda one: pairs[one][0])
    text = table(
        ["configuration", "predicted s", "measured CPU s", "ratio", "largest part"],
        [rows[one] for one in by_time],
    )
    lines = [
        "Step times of one thread, R = 1; predicted with mf_train/planning/devices.yaml `cpu`, whose rates were "
        "measured on other sizes (--calibrate); measured: CPU seconds, the least of steps 2 and 3",
        text,
        f"ranking {'exact' if by_time == order else 'NOT exact'}; Spearman {spearman(pairs):.3f}",
    ]
    machine.report("plan-time", lines, save=given.save)


def spearman(pairs: list[tuple[float, float]]) -> float:
    """Rank correlation of two columns without ties."""
    ranks = [[sorted(column).index(value) for value in column] for column in zip(*pairs, strict=True)]
    n = len(pairs)
    return 1 - 6 * sum((one - other) ** 2 for one, other in zip(*ranks, strict=True)) / (n * (n**2 - 1))


if __name__ == "__main__":
    main()
