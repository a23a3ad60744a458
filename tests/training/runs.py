"""Real training runs in processes of their own, small enough for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.warm import Running

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "tokenizer"


def small_config(folder: Path, text: Path) -> dict[str, Any]:
    """A configuration tree that trains in seconds on the JSONL file `text` and writes to `folder`."""
    return {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "bits": 4,
            "vocab_size": 4096,
            "sequence_length": 32,
        },
        "data": {"train": [{"path": str(text)}], "validation": [{"path": str(text)}], "logical_streams": 8},
        "tokenizer": {"path": str(TOKENIZER)},
        "optimizer": {"learning_rate": 3e-3},
        "schedule": {"kind": "constant", "warmup_steps": 2},
        "training": {
            "steps": 12,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "device": "cpu",
            "output_dir": str(folder),
            "validation_sequences": 5,
        },
        "logging": {"tensorboard": False, "interval": 1},
    }


def write_text(path: Path, documents: int = 40) -> Path:
    """A JSONL file of short English documents, different from each other."""
    words = "the union of states shall order its affairs with care and report each year to the people".split()
    with path.open("w") as file:
        for number in range(documents):
            text = " ".join(words[(number * 7 + i * i) % len(words)] for i in range(60 + number))
            file.write(json.dumps({"text": f"Message {number}. {text}"}) + "\n")
    return path


def run_command(
    arguments: list[str], processes: int = 1, timeout: float = 240, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """`memoryformer ARGUMENTS` in one process or several; `cold`: started as users do, under torchrun if several."""
    command = command_line(arguments, processes)
    if cold:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=REPOSITORY
        )
    running = Running(arguments, environment(), REPOSITORY, processes)
    out, errors = running.communicate(timeout)
    return subprocess.CompletedProcess(command, running.poll() or 0, out, errors)


def command_line(arguments: list[str], processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), "-m", "mf_train", *arguments]


def environment() -> dict[str, str]:
    outside = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in outside}
    # first this tree, then what the machine keeps outside its Python
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def train(
    tree: dict[str, Any], *overrides: str, processes: int = 1, expect: int = 0, cold: bool = False
) -> subprocess.CompletedProcess[str]:
    """Train a configuration tree, its file written beside the output folder; asserts the exit status."""
    done = run_command(["train", write_config(tree), *overrides], processes, cold=cold)
    # torchrun ends with 1 whatever its processes ended with, and so do warm ranks
    wanted = expect if processes == 1 else min(expect, 1)
    assert done.returncode == wanted, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(
    tree: dict[str, Any], processes: int = 1, cold: bool = False, **variables: str
) -> subprocess.Popen[str] | Running:
    """A run that is going to be disturbed; `variables` are more of its environment."""
    arguments = ["train", write_config(tree)]
    if not cold:
        return Running(arguments, environment() | variables, REPOSITORY, processes)
    return subprocess.Popen(
        command_line(arguments, processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | variables,
        cwd=REPOSITORY,
    )


def write_config(tree: dict[str, Any]) -> str:
    """The path of a configuration tree's file, beside its output folder."""
    folder = Path(tree["training"]["output_dir"])
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def wait_for(condition: Callable[[], object], seconds: float = 120, every: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)


def has_steps(tree: dict[str, Any], steps: int = 1) -> bool:
    """Whether a run has recorded so many steps."""
    metrics = Path(tree["training"]["output_dir"]) / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= steps


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of standard error that the command itself wrote."""
    return [line for line in done.stderr.splitlines() if line.startswith("memoryformer: ")]
