"""What the benchmarks share: the machine in a line, its bandwidth, interleaved timing, other programs, a report."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch


def description() -> str:
    """The processor, torch's version, threads and instruction set, in one line."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown processor",
    )
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{model}, {torch.get_num_threads()} threads, {capability}, torch {torch.__version__}"


def compare(
    alternatives: Mapping[str, Callable[[], object]], seconds: float = 2.0, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each alternative, called in turn until `seconds` are over, and each at least 5 times.

    In turn, so that a slow moment of a shared machine falls on all of them.
    """
    for function in list(alternatives.values()) * warmup:
        function()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in alternatives.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(megabytes: int = 256, seconds: float = 1.0) -> float:
    """Bytes a second, read plus written, of copying an array that no cache holds, with torch's threads."""
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / compare({"copy": lambda: target.copy_(source)}, seconds)["copy"]


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
