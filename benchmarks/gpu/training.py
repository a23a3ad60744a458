"""The trainer on tiny and small and their dense peers: tokens/s, memory, shares of the device, and a profile by part.

Each is `python -m mf_train train` on random token shards, with the shipped configuration but for the batch. The run is
ended once its profile is written: a checkpoint after the last step would take longer than the steps.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.steps import Line, Steps, part_arguments
from mf_train.run_folder import read_metrics

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = ("tiny", "dense-tiny", "small", "dense-small")
WARM_UP, TIMED, PROFILED = 3, 6, 3  # steps; the profiled ones come last and are not timed
_LARGE_MEMORY = 60e9  # bytes from which on 16 sequences of 2048 tokens go through at once
_SMALL = {"model.hidden_size": 64, "model.num_layers": 2, "model.num_heads": 4, "model.vocab_size": 512}


def write_tokens(folder: Path, vocabulary: int, sequences: int, length: int) -> Path:
    """A token shard of random tokens, low ids more frequent than high ones."""
    import numpy as np

    from mf_train.data.shards.shard import TokenShardWriter, token_dtype

    random = np.random.default_rng(0)
    prefix = folder / "random"
    with TokenShardWriter(prefix, token_dtype(vocabulary)) as writer:
        for _ in range(sequences):
            tokens = (random.random(length) ** 3 * (vocabulary - 1)).astype(np.int64) + 1
            tokens[-1] = 0  # end of text
            writer.add(tokens)
        writer.finish()
    return prefix


def overrides(folder: Path, rehearse: bool) -> dict[str, Any]:
    """Keys of the configuration that differ from the shipped ones."""
    vocabulary, length = (512, 64) if rehearse else (50304, 2048)
    micro = 2 if rehearse else 16 if torch.cuda.mem_get_info()[1] >= _LARGE_MEMORY else 4
    sequences = 2 * micro * (WARM_UP + TIMED + PROFILED + 3)
    found: dict[str, Any] = {
        "data.train": f"[{{path: {write_tokens(folder, vocabulary, sequences, length)}}}]",
        "data.validation": "[]",
        "tokenizer": "{end_of_text_id: 0}",
        "parallel.tensor": 1,
        "training.steps": 1000,  # never reached
        "training.global_batch_size": 2 * micro,
        "training.micro_batch_size": micro,
        "training.validation_interval": 0,
        "training.output_dir": folder / "run",
        "training.profile.start": WARM_UP + TIMED + 1,
        "training.profile.steps": PROFILED,
        "checkpoint.interval": 0,
        "logging.tensorboard": "false",
        "logging.interval": 1,
    }
    if rehearse:
        found |= _SMALL | {"model.sequence_length": length, "training.device": "cpu"}
    return found


def train(name: str, kept: Path, rehearse: bool) -> Mapping[str, Any]:
    """Start the trainer, end it once its profile is written, and say what its files hold."""
    with tempfile.TemporaryDirectory(prefix="memoryformer-gpu-") as folder:
        run = Path(folder) / "run"
        keys = overrides(Path(folder), rehearse)
        command = [sys.executable, "-m", "mf_train", "train", str(REPOSITORY / "configs" / f"{name}.yaml")]
        command += [f"{key}={value}" for key, value in keys.items()]
        began, last, first_step = time.perf_counter(), "", 0.0
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as trainer:
            assert trainer.stdout is not None
            for line in trainer.stdout:
                print(line, end="", flush=True)
                last = line.strip() or last
                if line.startswith("step 1/"):
                    first_step = time.perf_counter() - began
                if summaries(run):
                    trainer.kill()
                    break
        if not summaries(run):
            raise RuntimeError(f"the trainer ended with status {trainer.returncode}: {last}")
        for trace in (run / "profile").glob("*.trace.json.gz"):
            shutil.copy(trace, kept / f"{name}.trace.json.gz")
        profile = json.loads(summaries(run)[0].read_text(encoding="utf-8"))
        return measured(read_metrics(run), keys) | {
            "first_step_seconds": first_step,
            "profile": profile,
        }


def summaries(run: Path) -> list[Path]:
    return sorted((run / "profile").glob("*.summary.json"))


def measured(metrics: list[Line], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Of the timed steps: the median speed, shares of the device's peak rates, and the largest memory."""
    timed = [line for line in metrics if WARM_UP < line["step"] <= WARM_UP + TIMED]
    found: dict[str, Any] = {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in timed),
        "micro_batch_size": keys["training.micro_batch_size"],
        "data_wait_share": statistics.median(
            line["data_wait_seconds"] / line["step_seconds"] for line in timed
        ),
        "loss": metrics[-1]["loss"],
    }
    for key in ("flops_share", "bandwidth_share"):
        known = [line[key] for line in timed if line[key] is not None]
        found[key] = statistics.median(known) if known else None
    return found


def main() -> None:
    parser = part_arguments(__doc__)
    parser.add_argument(
        "--configs", nargs="+", default=CONFIGS, help="names in configs/ (default: %(default)s)"
    )
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # a trainer on the CPU has its own operation
    steps, kept = Steps(options.results), options.folder or options.results.parent
    for name in options.configs:
        steps.run(name, lambda name=name: train(name, kept, options.rehearse))


if __name__ == "__main__":
    main()
