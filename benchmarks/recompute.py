"""`python -m benchmarks.recompute`: what `training.recompute: block` saves and costs, beside the plan's prediction.

Forward and backward pass of a micro-batch on one thread, without the update: CPU seconds, the least of passes in turn,
as in `benchmarks.plan_time`, because the machine may be busy. kept: bytes that the forward pass leaves
for the backward pass, as torch's allocator counts them.
"""

import argparse
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.tables import table
from mf_train.config import Config, ModelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.parallel.recompute import recompute_blocks
from mf_train.planning.devices import find_device
from mf_train.planning.time import estimate_step
from mf_train.training.device import keep_freed_memory

PASSES = 8

QUICKSTART = ModelConfig(
    hidden_size=192, num_layers=4, num_heads=4, bits=6, vocab_size=2048, sequence_length=256
)
# Models and rows of a micro-batch
CASES = {
    "quickstart": (QUICKSTART, 8),
    "12 blocks, rows of 1024": (replace(QUICKSTART, num_layers=12, sequence_length=1024), 1),
    "dense, 12 blocks": (replace(QUICKSTART, kind="dense", num_layers=12), 4),
}


def build(model: ModelConfig, recompute: str) -> MemoryFormer:
    built = MemoryFormer(model)
    if recompute == "block":
        recompute_blocks(built, None)
    return built


def losses(model: MemoryFormer, tokens: Tensor) -> Tensor:
    each: Tensor = model(tokens[:, :-1], tokens[:, 1:])
    return each.mean()


def kept_bytes(model: MemoryFormer, tokens: Tensor) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = losses(model, tokens)
    loss.backward()  # type: ignore[no-untyped-call]  # only now may what was kept go
    return sum(event.self_cpu_memory_usage for event in profile.events())


def predicted_seconds(model: ModelConfig, rows: int, recompute: str) -> float:
    """Of the passes, without update and copies of gradients."""
    training = TrainingConfig(global_batch_size=rows, micro_batch_size=rows, recompute=recompute)  # type: ignore[arg-type]
    parts = estimate_step(Config(model=model, training=training), 1, 1, find_device("cpu")).parts
    return sum(part.seconds for part in parts if part.name not in ("update", "gradient copies"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__)
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/DATE-recompute.txt"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    rows = []
    for name, (config, batch) in CASES.items():
        tokens = torch.randint(config.vocab_size, (batch, config.sequence_length + 1))
        models = {kind: build(config, kind) for kind in ("none", "block")}
        kept = {kind: kept_bytes(model, tokens) for kind, model in models.items()}
        seconds = dict.fromkeys(models, float("inf"))
        for _ in range(PASSES):
            for kind, model in models.items():
                began = time.process_time()
                losses(model, tokens).backward()  # type: ignore[no-untyped-call]
                seconds[kind] = min(seconds[kind], time.process_time() - began)
        predicted = {kind: predicted_seconds(config, batch, kind) for kind in models}
        rows.append(
            [
                name,
                *(f"{kept[kind] / 1e6:.1f}" for kind in models),
                *(f"{1000 * seconds[kind]:.0f}" for kind in models),
                f"{seconds['block'] / seconds['none']:.2f}",
                f"{predicted['block'] / predicted['none']:.2f}",
            ]
        )
    columns = ["float32", "kept MB", "recomputed", "CPU ms", "recomputed", "ratio", "predicted"]
    machine.report("recompute", [table(columns, rows)], save=given.save)


if __name__ == "__main__":
    main()
