"""`python -m benchmarks.gpu`: runs the parts, keeps what they found, and prints it. Exit status 0: nothing failed."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.parts import PARTS, Part
from benchmarks.gpu.runner import REPOSITORY, PartResult, Runner
from benchmarks.tables import aligned
from mf_train.errors import UserError
from mf_train.exit_status import MISTAKE
from mf_train.files import write_whole
from mf_train.training.environment import set_kernel_cache

FORMAT = "memoryformer gpu results 1"
LOOK_SECONDS = 90  # for importing torch from a slow disk and for a driver that wakes up
LOOK_AGAIN_SECONDS = 30
REHEARSAL = 5  # times as long for each part: an interpreter and two cores


def main() -> None:
    options = parse_arguments()
    parts = choose(options.only)
    if options.dry:
        print(plan(parts, options.minutes))
        return
    environment = dict(os.environ)
    try:
        set_kernel_cache(environment)
    except UserError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    began = time.monotonic()
    folder = options.output
    folder.mkdir(parents=True, exist_ok=True)
    machine = look()
    if options.rehearse:
        machine["problem"] = ""
        parts = [
            replace(
                part, **{name: getattr(part, name) * REHEARSAL for name in ("seconds", "limit", "step_limit")}
            )
            for part in parts
        ]
    print(describe(machine, options.rehearse), flush=True)
    if options.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    runner = Runner(
        folder,
        end=began + 60 * options.minutes * (REHEARSAL if options.rehearse else 1),
        arguments=["--rehearse"] if options.rehearse else [],
        environment=environment,
        device_answers=lambda: options.rehearse or not look(LOOK_AGAIN_SECONDS)["problem"],
    )
    runner.lost = machine["problem"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    outcomes: list[PartResult] = []
    for part in parts:
        print(f"{part.name}: up to {part.limit} s, about {part.seconds} s expected", flush=True)
        outcomes.append(runner.run(part))
        keep(folder, machine, outcomes, options.rehearse, time.monotonic() - began)
    text = "\n\n".join(
        piece
        for piece in (
            report.long_tables(outcomes),
            "\n".join(report.skips(outcomes)),
            "\n".join(report.failures(outcomes)),
            f"{title(machine, options.rehearse)}, {time.monotonic() - began:.0f} s\n{report.short_table(outcomes)}",
        )
        if piece
    )
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\nkept in {folder}: results.json, table.txt, output.log\n\n{text}")
    sys.exit(any(outcome.failed for outcome in outcomes))


def parse_arguments() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Proves and times everything on one GPU. Parts: "
        + "; ".join(f"{part.name} ({part.about})" for part in PARTS),
    )
    parser.add_argument("--dry", action="store_true", help="print the plan with each part's time, and end")
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)g)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs") / time.strftime("gpu-%Y%m%d-%H%M%S"),
        help="folder for results.json, table.txt, device.yaml, output.log and traces (default: %(default)s)",
    )
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="without a GPU: every part at small sizes on the CPU, Triton in its interpreter. Its times mean nothing",
    )
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes {options.minutes:g}: give a number above 0")
    options.output = options.output.resolve()
    return options


def choose(only: list[str] | None) -> list[Part]:
    return [part for part in PARTS if only is None or part.name in only]


def plan(parts: list[Part], minutes: float) -> str:
    """The parts with what they are expected to take (estimates until a GPU has run them) and their limits."""
    header = ["part", "expected s", "limit s", "a step s", ""]
    rows = [[part.name, *map(str, (part.seconds, part.limit, part.step_limit)), part.about] for part in parts]
    lines = aligned([header, *rows], left=(0, 4))
    lines += [
        f"{part.name} will not run here: {', '.join(lacking)} not installed"
        for part in parts
        if (lacking := part.missing())
    ]
    total = sum(part.seconds for part in parts)
    lines.append(f"{total} s expected in all, {minutes * 60:.0f} s allowed; what is left out then says so")
    return "\n".join(lines)


def look(seconds: float = LOOK_SECONDS) -> dict[str, Any]:
    """What `benchmarks.gpu.look` says of this machine, or why it says nothing."""
    nothing: dict[str, Any] = {"device": None, "packages": {}, "missing": []}
    command = [sys.executable, "-m", "benchmarks.gpu.look"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return nothing | {"problem": f"the GPU did not answer within {seconds:.0f} s"}
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return nothing | {"problem": f"looking for a GPU failed: {last}"}
    return found


def title(machine: dict[str, Any], rehearse: bool) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    name = "rehearsal on the CPU, whose times mean nothing" if rehearse else "no GPU"
    if not rehearse and machine["device"]:
        device = machine["device"]
        name = f"{device['name']}, driver {machine['driver']}, CUDA {device['cuda']}"
    return f"{name}; Python {machine.get('python', '?')}, {versions}"


def describe(machine: dict[str, Any], rehearse: bool) -> str:
    lines = [title(machine, rehearse)]
    if machine["problem"]:
        lines.append(f"nothing can run: {machine['problem']}")
    if machine["missing"]:
        lines.append(
            f"not installed: {', '.join(machine['missing'])}; docs/kernels.md says how to bring them without a network"
        )
    if machine.get("compiler") and not rehearse:
        lines.append(f"this machine {machine['compiler']}")
    return "\n".join(lines)


def keep(
    folder: Path, machine: dict[str, Any], outcomes: list[PartResult], rehearse: bool, seconds: float
) -> None:
    """Write results.json anew, whole or not at all, after every part."""
    tree = {
        "format": FORMAT,
        "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "rehearsal": rehearse,
        "seconds": round(seconds, 1),
        "machine": machine,
        "parts": [outcome.to_tree() for outcome in outcomes],
    }
    write_whole(folder / "results.json", (json.dumps(tree, indent=1) + "\n").encode())


def commit() -> str | None:
    """The commit that is checked out, with + where files differ from it."""
    try:
        command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    main()
