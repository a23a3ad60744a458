"""`python -m benchmarks.telemetry`: what counting the tables' reads costs, as a share of a step.

Passes with and without counting take turns in one process, in CPU seconds, and the counting itself is timed on the
codes of the model's hashes. The optimiser's update is left out, so the shares are upper bounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from benchmarks import machine
from mf_train.config import LoggingConfig
from mf_train.config.loading import load_config
from mf_train.config.model import ModelConfig
from mf_train.kernels import count_codes
from mf_train.kernels.composition import code_dtype
from mf_train.model import MemoryFormer
from mf_train.model.memory import record_codes
from mf_train.telemetry.alarms import Alarms
from mf_train.telemetry.counts import ReadCounts
from mf_train.telemetry.statistics import HashStatistics, table_numbers

PROBE_TOKENS = 128


def models() -> dict[str, tuple[ModelConfig, int]]:
    """Model and sequences of a micro batch, by name."""
    tiny = ModelConfig(num_layers=2, vocab_size=4096, sequence_length=512)
    return {
        "quickstart": (load_config("configs/quickstart.yaml").model, 8),
        "tiny, 2 of its 6 layers, V 4096, S 512": (tiny, 2),
    }


def cpu_seconds(action: Callable[[], object]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


def measure(name: str, config: ModelConfig, sequences: int, rounds: int) -> None:
    model = MemoryFormer(config)
    counts = ReadCounts(model, config.num_tables, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (sequences, config.sequence_length + 1), generator=generator)

    def step(counted: bool) -> None:
        with counts.counting() if counted else nullcontext():
            model(rows[:, :-1], rows[:, 1:]).mean().backward()
        model.zero_grad(set_to_none=True)

    with record_codes(model) as codes, torch.no_grad():
        model(rows[:, :-1])

    def count(backend: str) -> None:
        for hash_, found in codes.items():
            count_codes(found, counts.by_hash[hash_], backend=backend)

    alarms = Alarms(LoggingConfig())

    def report() -> None:
        hashes = [HashStatistics(hash_, table_numbers(value)) for hash_, value in counts.by_hash.items()]
        for one in hashes:
            one.summary()
        alarms.update(hashes)

    def probe() -> None:
        with torch.no_grad():
            model(rows[:1, :PROBE_TOKENS])

    step(True)
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for key, action in (
            ("step without", lambda: step(False)),
            ("step with", lambda: step(True)),
            ("counting, C++", lambda: count("cpu")),
            ("counting, torch operations", lambda: count("composition")),
            ("counting, torch.bincount (reference)", lambda: count("reference")),
            ("one report: statistics and alarms", report),
            ("one report: the probe's pass", probe),
        ):
            times.setdefault(key, []).append(cpu_seconds(action))
    base = statistics.median(times["step without"])
    reads = sum(value.numel() for value in codes.values())
    print(
        f"\n{name}: {sequences} x {config.sequence_length} tokens, {len(codes)} hashes, {reads:,} reads a step"
    )
    print(f"{'CPU seconds':<40} {'median':>9} {'of a step':>10} {'ns a read':>10}")
    for key, values in times.items():
        median = statistics.median(values)
        each = f"{median / reads * 1e9:10.2f}" if key.startswith("counting") else ""
        print(f"{key:<40} {median:9.4f} {median / base:10.2%} {each}")
    ratios = sorted(b / a - 1 for a, b in zip(times["step without"], times["step with"], strict=True))
    quarter = len(ratios) // 4
    print(
        f"a step with counting against the one before it without: median {statistics.median(ratios):+.2%}, middle "
        f"half {ratios[quarter]:+.2%} to {ratios[-1 - quarter]:+.2%}"
    )


def measure_sizes() -> None:
    print(
        "\nC++ counting by the size of a table: ns a read, 8,192 tokens, 64 tables, uniform and skewed codes"
    )
    generator = torch.Generator().manual_seed(0)
    for tau in (4, 6, 8, 10, 12, 16):
        codes = torch.randint(2**tau, (8192, 64), generator=generator)
        skewed = codes * (torch.rand(codes.shape, generator=generator) < 0.5)
        counts, each = torch.zeros(64, 2**tau, dtype=torch.int64), []
        for values in (codes, skewed):
            narrow = values.to(code_dtype(tau))
            each.append(
                min(cpu_seconds(partial(count_codes, narrow, counts)) for _ in range(9)) / codes.numel()
            )
        print(f"tau {tau:2}  {each[0] * 1e9:6.2f} {each[1] * 1e9:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(machine.description())
    for name, (config, sequences) in models().items():
        measure(name, config, sequences, rounds)
    measure_sizes()


if __name__ == "__main__":
    main()
