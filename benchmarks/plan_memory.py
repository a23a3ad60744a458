"""`python -m benchmarks.plan_memory`: the peak memory that the planner predicts of CPU ranks against what they take.

Each rank is a process of `benchmarks.rank_memory`: two steps on random tokens, the largest peak of all ranks, above
what was resident before the model was built. The slow tests hold every configuration of CASES within 12 %.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine
from benchmarks.tables import table
from mf_train.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from mf_train.config.loading import config_to_tree
from mf_train.planning.device_memory import LIBRARIES, estimate_memory

TABLES = ModelConfig(hidden_size=192, num_layers=3, num_heads=4, bits=8, vocab_size=4096, sequence_length=128)
ROWS = ModelConfig(hidden_size=128, num_layers=6, num_heads=4, bits=4, vocab_size=4096, sequence_length=512)
LONG = replace(ROWS, num_layers=4, bits=8)  # its activations are larger than its tables
DEEP = replace(ROWS, num_layers=16, vocab_size=1024)  # its activations are larger than its logits
PRODUCT = replace(ROWS, ffn="product_key", product_keys=64, product_query=64)  # and 16 reads of 4 heads each
DENSE = replace(ROWS, kind="dense", hidden_size=512, vocab_size=16384)


def case(
    model: ModelConfig,
    batch: int,
    micro: int,
    stage: int,
    precision: Any = "float32",
    held: tuple[Any, Any] = ("float32", "float32"),
    recompute: Any = "none",
    **parallel: Any,
) -> Config:
    """On a CPU, with sequences a step and a micro-batch, ZeRO stage, precision, kinds of both moments."""
    training = TrainingConfig(
        global_batch_size=batch,
        micro_batch_size=micro,
        precision=precision,
        recompute=recompute,
        device="cpu",
    )
    first, second = held
    return Config(
        model=model,
        training=training,
        optimizer=OptimizerConfig(table_exp_avg=first, table_exp_avg_sq=second),
        parallel=ParallelConfig(zero_stage=stage, **parallel),
    )


LEAST = ("int8", "row")
# Processes and configurations: every stage, both precisions, tables or activations as the larger part
CASES: dict[str, tuple[int, Config]] = {
    "stage 0": (1, case(TABLES, 2, 2, 0)),
    "stage 1, R = 2": (2, case(TABLES, 2, 1, 1)),
    "stage 3, R = 2": (2, case(TABLES, 2, 1, 3)),
    "bfloat16, stage 1": (1, case(TABLES, 2, 2, 1, "bfloat16")),
    "bfloat16, stage 2": (1, case(TABLES, 2, 2, 2, "bfloat16")),
    "bfloat16, stage 2, R = 2": (2, case(TABLES, 2, 1, 2, "bfloat16")),
    "bfloat16, stage 3, R = 2": (2, case(TABLES, 2, 1, 3, "bfloat16")),
    "long rows": (1, case(ROWS, 4, 4, 1)),
    "long rows, P = 2": (2, case(ROWS, 4, 4, 1, tensor=2)),
    "long rows, bfloat16": (1, case(ROWS, 4, 4, 2, "bfloat16")),
    "2 micro-batches": (1, case(LONG, 8, 4, 0)),
    "2 micro-batches, bfloat16": (1, case(LONG, 8, 4, 0, "bfloat16")),
    "dense": (1, case(DENSE, 4, 2, 1)),
    "product keys": (1, case(PRODUCT, 4, 2, 1)),
    "product keys, bfloat16, P = 2": (2, case(PRODUCT, 8, 4, 1, "bfloat16", tensor=2)),
    "deep": (1, case(DEEP, 8, 4, 1)),
    # recomputation
    "recompute": (1, case(DEEP, 8, 4, 1, recompute="block")),
    "recompute, P = 2": (2, case(DEEP, 8, 4, 0, recompute="block", tensor=2)),
    "recompute, bfloat16": (1, case(DEEP, 8, 4, 2, "bfloat16", recompute="block")),
    "recompute, stage 3, R = 2": (2, case(DEEP, 8, 4, 3, recompute="block")),
    "recompute, dense": (1, case(replace(DENSE, vocab_size=1024), 8, 4, 1, recompute="block")),
    # how masters and moments are held
    "split": (1, case(TABLES, 2, 2, 1, "bfloat16", master="split")),
    "row": (1, case(TABLES, 2, 2, 1, "float32", ("float32", "row"))),
    "bfloat16, bfloat16": (1, case(TABLES, 2, 2, 1, "float32", ("bfloat16", "bfloat16"))),
    "int8, int8": (1, case(TABLES, 2, 2, 0, "bfloat16", ("int8", "int8"))),
    "bfloat16, row, split, P = 2": (
        2,
        case(TABLES, 2, 2, 1, "bfloat16", ("bfloat16", "row"), tensor=2, master="split"),
    ),
    "int8, row, split": (1, case(TABLES, 2, 2, 1, "bfloat16", LEAST, master="split")),
    "int8, row, split, stage 2, R = 2": (2, case(TABLES, 2, 1, 2, "bfloat16", LEAST, master="split")),
    "int8, row, stage 3, R = 2": (2, case(TABLES, 2, 1, 3, "bfloat16", LEAST)),
    # in the host's memory, which on a CPU is the same
    "offload": (1, case(TABLES, 2, 2, 1, offload="optimizer")),
    "offload, split, R = 2": (
        2,
        case(TABLES, 2, 1, 1, "bfloat16", master="split", offload="optimizer"),
    ),
    "offload, int8, row": (1, case(TABLES, 2, 2, 2, "bfloat16", LEAST, offload="optimizer")),
    # how gradients are sent
    "no overlap, stage 1, R = 2": (2, case(TABLES, 2, 1, 1, "bfloat16", overlap=False)),
    "no overlap, stage 2, R = 2": (2, case(TABLES, 4, 1, 2, "bfloat16", overlap=False)),
    "sent in bfloat16, R = 2": (2, case(TABLES, 2, 1, 1, "bfloat16", reduce_dtype="bfloat16")),
    "small buckets, stage 2, R = 2": (2, case(TABLES, 4, 1, 2, "bfloat16", bucket_size=1_000_000)),
    # several at once
    "recompute, int8, row, split, P = 2": (
        2,
        case(DEEP, 8, 4, 1, "bfloat16", LEAST, "block", tensor=2, master="split"),
    ),
    "recompute, bfloat16, row, R = 2": (
        2,
        case(DEEP, 8, 2, 2, "float32", ("bfloat16", "row"), "block"),
    ),
}


def predict(config: Config, processes: int) -> float:
    """Bytes of a CPU rank above those before the model was built."""
    return estimate_memory(config, processes, "cpu").peak - LIBRARIES


def measure(configs: dict[str, Config], processes: int, folder: Path) -> dict[str, int]:
    """Of each the largest peak of all ranks, in bytes above those before the model was built."""
    paths = {name: folder / f"{number}.yaml" for number, name in enumerate(configs)}
    for name, path in paths.items():
        path.write_text(yaml.safe_dump(config_to_tree(configs[name])), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # freed tensors go back to the system at once, so that resident memory is what is held
    shared = {name: "65536" for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")}
    shared |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "benchmarks.rank_memory", str(folder), *map(str, paths.values())]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | shared | {"RANK": str(rank)}, cwd=Path(__file__).resolve().parents[1]
        )
        for rank in range(processes)
    ]
    try:
        for rank in ranks:
            assert rank.wait() == 0, "a rank failed"
    finally:
        for rank in ranks:
            rank.kill()
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]
    return {name: max(max(each[path.stem]["peaks"]) for each in found) for name, path in paths.items()}


def compare(names: list[str]) -> list[list[str]]:
    """A row of the table for each of the configurations. Those of as many ranks share the processes."""
    measured: dict[str, int] = {}
    for processes in sorted({CASES[name][0] for name in names}):
        configs = {name: CASES[name][1] for name in names if CASES[name][0] == processes}
        with tempfile.TemporaryDirectory() as folder:
            measured |= measure(configs, processes, Path(folder))
    rows = []
    for name in names:
        predicted = predict(CASES[name][1], CASES[name][0])
        error = f"{predicted / measured[name] - 1:+.1%}"
        rows.append([name, f"{predicted / 1e6:.1f}", f"{measured[name] / 1e6:.1f}", error])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_memory", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of configurations; default: all")
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/DATE-plan-memory.txt"
    )
    given = parser.parse_args()
    if unknown := [name for name in given.cases if name not in CASES]:
        parser.error(f"{unknown[0]}: choose of {'; '.join(CASES)}")
    rows = compare(given.cases or list(CASES))
    text = table(["configuration", "predicted MB", "measured MB", "predicted / measured - 1"], rows)
    machine.report("plan-memory", ["CPU ranks (gloo), one thread each", text], save=given.save)


if __name__ == "__main__":
    main()
