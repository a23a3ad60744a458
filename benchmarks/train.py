"""Training steps of a configuration with the C++ operation and without it, in the real trainer.

Without: the same command where no compiler is found and the cache of compiled libraries is empty, so that
hash, lookup, norms and cross-entropy run as torch operations. Runs take turns; the figure is the median step.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import machine
from benchmarks.tables import table
from mf_train.run_folder import read_metrics

WARM_UP = 5  # steps left out of each run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=30, help="of each run, %(default)s by default")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind, %(default)s by default")
    parser.add_argument("--processes", type=int, default=2, help="each on one thread, %(default)s by default")
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/DATE-train.txt")
    options = parser.parse_args()

    seconds: dict[str, list[float]] = {"C++ operation": [], "torch operations": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for kind in seconds:
                seconds[kind] += run(options, kind, Path(folder) / f"{kind}-{turn}".replace(" ", "-"))
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    rows = [
        [kind, f"{1e3 * medians[kind]:.0f}", f"{1e3 * min(values):.0f}", f"{1e3 * max(values):.0f}"]
        for kind, values in seconds.items()
    ]
    fast, slow = medians.values()
    title = f"{options.config}: {options.processes} processes, {options.rounds} runs of {options.steps} steps"
    text = table(["", "median ms a step", "least", "most"], rows)
    machine.report("train", [title, text, f"ratio of medians: {slow / fast:.2f}"], save=options.save)


def run(options: argparse.Namespace, kind: str, folder: Path) -> list[float]:
    """Seconds of each step of one run; ends the program with the run's own output where it fails."""
    variables = {"OMP_NUM_THREADS": "1"}
    if kind == "torch operations":
        (folder / "empty").mkdir(parents=True)
        variables |= {"PATH": str(folder / "empty"), "XDG_CACHE_HOME": str(folder / "empty")}
    command = [
        *machine.torchrun(options.processes),
        *("-m", "mf_train", "train", options.config, f"training.steps={options.steps}"),
        *(f"training.output_dir={folder / 'run'}", "training.validation_interval=0", "checkpoint.interval=0"),
    ]
    said = machine.run_program(command, **variables)
    if "hash and lookup: " + ("C++" if kind == "C++ operation" else "torch") not in said:
        sys.exit(f"{' '.join(command)}\n{said}\nran without the {kind}")
    return [record["step_seconds"] for record in read_metrics(folder / "run")][WARM_UP:]


if __name__ == "__main__":
    main()
