"""What the benchmarks share: the machine in a line, its caches' bandwidth, other programs, a report."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mf_train.processors import processor_name


def description() -> str:
    """The processor, torch's version, threads and instruction set, in one line."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{processor_name()}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"


def read_bandwidth(bytes_per_thread: int, seconds: float = 0.5) -> float:
    """Bytes a second of reading, again and again, an array of this size for each of torch's threads.

    A quarter of a core's L2 gives L2's bandwidth. One call of torch sums each array many times over (a stride of 0),
    so that starting it costs nothing; the best of the calls, since a ceiling is asked for.
    """
    threads = torch.get_num_threads()
    repeats = max(1, 2**27 // bytes_per_thread)
    values = torch.ones(threads, 1, bytes_per_thread // 4).expand(-1, repeats, -1)
    out = torch.empty(threads, repeats)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.sum(values, dim=2, out=out)
        best = min(best, time.perf_counter() - start)
    return threads * repeats * bytes_per_thread / best


def torchrun(processes: int) -> list[str]:
    """The command before a program's arguments that starts it in several processes."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


def run_program(command: Sequence[str], **variables: str) -> str:
    """What a command prints, run with these environment variables; ends this program with all of it where it fails."""
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}\nended with {done.returncode}")
    return done.stdout


def report(name: str, parts: Sequence[str], *, save: bool) -> None:
    """Print the machine and the parts; with `save` also write them to benchmarks/results/DATE-NAME.txt."""
    text = "\n\n".join([description(), *parts])
    print(text)
    if save:
        path = Path(__file__).parent / "results" / f"{time.strftime('%Y-%m-%d')}-{name}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"\nsaved {path}")
