"""`python -m benchmarks.moments`: bytes and seconds of an update, by how masters and moments are held.

One fragment of a table as the tiny model has them, a row in units of 64 numbers, on one thread: CPU seconds, the least
of several updates, because the machine may be busy. Peaks of whole runs: `benchmarks.plan_memory`.
"""

import argparse
import time

import torch

from benchmarks import machine
from benchmarks.tables import table
from mf_train.config import OptimizerConfig
from mf_train.parallel.adamw import AdamW, Updated
from mf_train.parallel.fragment import Fragment
from mf_train.parallel.kinds import KINDS
from mf_train.parallel.stored import Float32, Places, Split, Stored, zeros
from mf_train.training.device import keep_freed_memory

NUMBERS, UNIT, UPDATES = 2**22, 64, 6
CPU = torch.device("cpu")
# first moments, second moments, masters
HELD = [
    ("float32", "float32", "float32"),
    ("float32", "float32", "split"),
    ("float32", "row", "float32"),
    ("bfloat16", "bfloat16", "float32"),
    ("int8", "int8", "float32"),
    ("bfloat16", "row", "split"),
    ("int8", "row", "split"),
    ("int8", "int8", "split"),
]


def fragment_of(first: str, second: str, master: str) -> Fragment:
    weights = torch.zeros(NUMBERS, dtype=torch.bfloat16)
    masters: Stored = Float32((torch.zeros(NUMBERS),), NUMBERS)
    if master == "split":
        masters = Split((weights, torch.zeros(NUMBERS, dtype=torch.int16)), NUMBERS)
    values = {
        "master": masters,
        "exp_avg": zeros(first, "exp_avg", NUMBERS, UNIT, CPU),
        "exp_avg_sq": zeros(second, "exp_avg_sq", NUMBERS, UNIT, CPU),
    }
    return Fragment(0, NUMBERS, values, torch.randn(NUMBERS))


def measure(fragment: Fragment, rounded: bool) -> float:
    """Nanoseconds of a number's update."""
    adamw = AdamW(OptimizerConfig(), 0, UNIT)
    updated = Updated(fragment, 0.1, 1.0, Places("tables", UNIT, 8, 8, 0, 0) if rounded else None)
    least = float("inf")
    for step in range(1, UPDATES + 1):
        began = time.process_time()
        adamw.update([updated], 1e-3, step)
        least = min(least, time.process_time() - began)
    return 1e9 * least / NUMBERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moments", description=__doc__)
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/DATE-moments.txt")
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as the trainer does
    rows, plain = [], 0.0
    for held in HELD:
        fragment = fragment_of(*held)
        nanoseconds = measure(fragment, bool({"bfloat16", "int8"} & {*held[:2]}))
        plain = plain or nanoseconds
        # the weight that the forward pass reads is a split master's first half
        extra = 0 if held[2] == "split" else 2
        each = extra + sum(fragment.values[kind].nbytes for kind in KINDS) / NUMBERS
        rows.append([", ".join(held), f"{each:.2f}", f"{nanoseconds:.1f}", f"{nanoseconds / plain:.1f}"])
    columns = ["exp_avg, exp_avg_sq, master", "bytes with a bfloat16 weight", "ns a number", "/ float32"]
    lines = [f"AdamW on a table of {NUMBERS:,} numbers, units of {UNIT}, one thread", table(columns, rows)]
    machine.report("moments", lines, save=given.save)


if __name__ == "__main__":
    main()
