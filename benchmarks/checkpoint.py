"""`python -m benchmarks.checkpoint`: what saving, resuming and converting cost, against `cp` of the same bytes.

save: the real trainer on a configuration with synchronous and with asynchronous saves; the step loop's waiting is
what it writes into its metrics. load: a checkpoint into engines of the same and of other degrees; "beyond a step" is
the peak memory of a rank above that of a training step. convert: `memoryformer convert` in a process of its own, whose
peak is counted above a Python that has imported torch. large: the same for another configuration, of random weights
without moments, under a limit of the system's (RLIMIT_DATA).

Alternatives take turns. Files are in the page cache as far as they fit; `cp` is followed by a sync, as every save is.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine
from benchmarks.memory import BARE, LIMITED, reset_peak, status
from benchmarks.tables import table
from mf_train.run_folder import read_metrics

PARTS = ("save", "load", "convert", "large")
REPOSITORY = Path(__file__).resolve().parents[1]
MB, GB = 1e6, 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; the first three by default"
    )
    parser.add_argument("--config", default="configs/tiny.yaml", help="%(default)s by default")
    parser.add_argument(
        "--large", default="configs/base.yaml", help="for the last part; %(default)s by default"
    )
    parser.add_argument("--limit", type=int, default=600, help="MB for the last part; %(default)s by default")
    parser.add_argument("--interval", type=int, default=6, help="steps between saves, %(default)s by default")
    parser.add_argument(
        "--rounds", type=int, default=2, help="turns of each alternative, %(default)s by default"
    )
    parser.add_argument(
        "--folder", type=Path, help="where there is room, beside the system's temporary files"
    )
    parser.add_argument(
        "--save", action="store_true", help="also write benchmarks/results/DATE-checkpoint.txt"
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        load_worker(*options.worker)
        return
    parts = options.parts or PARTS[:3]
    if unknown := set(parts) - set(PARTS):
        parser.error(f"{', '.join(unknown)}: choose of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="benchmark-checkpoint-") as folder:
        report: list[str] = []
        if set(parts) != {"large"}:
            checkpoint, found = save(options, Path(folder))
            report += found
            if "load" in parts:
                report += load(checkpoint, options.rounds)
            if "convert" in parts:
                report += convert(checkpoint, ("float32", "bfloat16"), 0, options.rounds)
        if "large" in parts:
            report += large(options, Path(folder))
        machine.report("checkpoint", report, save=options.save)


# Saving --------------------------------------------------------------------------------------------------------------


def save(options: argparse.Namespace, folder: Path) -> tuple[Path, list[str]]:
    """A checkpoint of two tensor-parallel ranks, and what it took."""
    path = write_config(options.config, folder)
    names = ("synchronous save", "asynchronous save", "stall of the latter", "cp")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[bool, list[float]] = {True: [], False: []}  # seconds of steps beside a save, and with none
    checkpoint = folder / "none"
    for turn in range(options.rounds):
        for asynchronous in (False, True):
            shutil.rmtree(checkpoint.parent.parent / "checkpoints", ignore_errors=True)
            run = folder / f"run-{turn}-{asynchronous}"
            metrics = train(path, run, options.interval, asynchronous)
            saves = [record for record in metrics if "checkpoint_seconds" in record]
            whole = [record["checkpoint_seconds"] for record in saves]
            seconds["asynchronous save" if asynchronous else "synchronous save"] += whole
            if asynchronous:
                stalls = [
                    record["checkpoint_stall_seconds"]
                    for record in metrics
                    if "checkpoint_stall_seconds" in record
                ]
                seconds["stall of the latter"] += stalls
                for begin in range(options.interval, len(metrics), options.interval):
                    end = next((r["step"] for r in saves if r["step"] > begin), begin)
                    steps[True] += [record["step_seconds"] for record in metrics[begin:end]]
            else:
                steps[False] += [record["step_seconds"] for record in metrics[options.interval :]]
            checkpoint = max((run / "checkpoints").glob("step-*"))
        seconds["cp"].append(copy_seconds(checkpoint))
    size = folder_size(checkpoint)
    cp = statistics.median(seconds["cp"])
    rows = [
        [
            name,
            *figures(values),
            f"{size / GB / statistics.median(values):.2f}",
            f"{statistics.median(values) / cp:.2f}",
        ]
        for name, values in seconds.items()
    ]
    title = f"{options.config}, 2 tensor-parallel ranks, {size / GB:.2f} GB a checkpoint"
    stall, synchronous = (
        statistics.median(seconds[name]) for name in ("stall of the latter", "synchronous save")
    )
    beside, other = (statistics.median(steps[key]) for key in (True, False))
    return checkpoint, [
        title,
        table(["", "median s", "least", "most", "GB/s", "/ cp"], rows),
        f"stall / synchronous save: {stall / synchronous:.3f}",
        f"a step beside a save / one with none: {beside:.2f} s / {other:.2f} s = {beside / other:.2f}",
    ]


def write_config(config: str, folder: Path) -> Path:
    """The configuration with the model as it is, on the shipped text, in small batches of short rows."""
    tree = yaml.safe_load((REPOSITORY / config).read_text(encoding="utf-8"))
    quickstart = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["model"]["sequence_length"] = min(tree["model"]["sequence_length"], 256)
    data = {
        kind: [{"path": str(REPOSITORY / source["path"])} for source in quickstart["data"][kind]]
        for kind in ("train", "validation")
    }
    tree |= {"data": data, "tokenizer": {"path": str(REPOSITORY / "tokenizer")}}
    tree["parallel"] = {"tensor": 2, "zero_stage": 0}
    tree["training"] = {
        "global_batch_size": 2,
        "micro_batch_size": 2,
        "precision": "float32",
        "device": "cpu",
        "validation_interval": 0,
    }
    tree["checkpoint"] = {"keep": 1}
    tree["logging"] = {"tensorboard": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def train(config: Path, run: Path, interval: int, asynchronous: bool) -> list[dict[str, Any]]:
    """Metrics of each step of a run that saves three times, the last time at its end."""
    arguments = [
        *("-m", "mf_train", "train", str(config), f"training.steps={3 * interval}"),
        *(f"checkpoint.interval={interval}", f"checkpoint.asynchronous={str(asynchronous).lower()}"),
        f"training.output_dir={run}",
    ]
    torchrun(2, arguments)
    return read_metrics(run)


# Loading -------------------------------------------------------------------------------------------------------------


def load(checkpoint: Path, rounds: int) -> list[str]:
    """Seconds and memory of reading a checkpoint of P x R = 2 x 1, and one of 1 x 1 made from it."""
    single = checkpoint.parent / "single"
    cases = [  # from, P, R, stage, where to write it again
        (checkpoint, 1, 1, 0, single),
        (checkpoint, 2, 1, 0, None),
        (checkpoint, 1, 2, 3, None),
        (single / checkpoint.name, 2, 1, 0, None),
    ]
    rows = []
    for source, tensor, data, stage, target in cases:
        found = [
            load_in_ranks(source, tensor, data, stage, target if turn == 0 else None)
            for turn in range(rounds)
        ]
        seconds = [max(rank["seconds"] for rank in ranks) for ranks in found]
        extra = max(rank["beyond_step"] for ranks in found for rank in ranks)
        step = max(rank["step_peak"] for ranks in found for rank in ranks)
        written = "1 x 1" if source != checkpoint else "2 x 1"
        rows.append(
            [
                f"{written} -> {tensor} x {data} stage {stage}",
                *figures(seconds),
                f"{folder_size(source) / GB / statistics.median(seconds):.2f}",
                f"{step / GB:.2f}",
                f"{extra / MB:.0f}",
            ]
        )
    read = statistics.median([read_seconds(checkpoint) for _ in range(rounds)])
    shutil.rmtree(single)
    header = ["load, P x R", "median s", "least", "most", "GB/s", "GB a rank in a step", "MB beyond a step"]
    return [
        table(header, rows),
        f"reading the files by one process (`cat`): {read:.2f} s, {folder_size(checkpoint) / GB / read:.2f} GB/s",
    ]


def load_in_ranks(
    checkpoint: Path, tensor: int, data: int, stage: int, target: Path | None
) -> list[dict[str, float]]:
    """What each rank measured."""
    with tempfile.TemporaryDirectory() as folder:
        worker = [str(checkpoint), str(tensor), str(stage), folder, *([str(target)] if target else [])]
        torchrun(tensor * data, ["-m", "benchmarks.checkpoint", "--worker", *worker])
        return [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]


def load_worker(checkpoint: str, tensor: str, stage: str, results: str, target: str | None = None) -> None:
    """One rank: a training step, then the load; writes its figures, and the checkpoint anew where `target` is given."""
    import torch

    from benchmarks.micro_batches import backward_passes
    from mf_train.checkpoint.fence import claim
    from mf_train.checkpoint.load import load_checkpoint
    from mf_train.checkpoint.read import CheckpointReader
    from mf_train.checkpoint.save import Extras, Saver
    from mf_train.config import CheckpointConfig
    from mf_train.config.loading import load_config
    from mf_train.parallel.degrees import Degrees
    from mf_train.parallel.engine import Engine
    from mf_train.parallel.exchange import Exchange
    from mf_train.parallel.groups import Groups, start_processes, stop_processes
    from mf_train.parallel.processes import find_process
    from mf_train.parallel.tensor import build_model

    process, cpu = find_process(), torch.device("cpu")
    config = load_config(Path(checkpoint) / "config.yaml")
    parallel = replace(config.parallel, tensor=int(tensor), zero_stage=int(stage))
    micro = 2 * int(tensor) // process.world_size
    config = replace(config, parallel=parallel, training=replace(config.training, micro_batch_size=micro))
    start_processes(process, cpu, 600)
    groups = Groups(Degrees(process.rank, process.world_size, int(tensor)), 600)
    model = build_model(config.model, Exchange(groups.tensor) if int(tensor) > 1 else None, 0, cpu)
    engine = Engine(model, config, groups, cpu)
    rows = torch.zeros((1, 2), dtype=torch.long)
    for _ in range(2):
        backward_passes(engine, [rows] * engine.micro_batches, engine.micro_batches)
        engine.update(0.0)
    reader = CheckpointReader(Path(checkpoint))
    step_peak = status("VmHWM")
    reset_peak()
    started = time.perf_counter()
    load_checkpoint(engine, reader)
    seconds = time.perf_counter() - started
    figures = {"seconds": seconds, "step_peak": step_peak, "beyond_step": status("VmHWM") - step_peak}
    (Path(results) / f"{process.rank}.json").write_text(json.dumps(figures))
    if target is not None:
        saver = Saver(engine, claim(Path(target)), CheckpointConfig(asynchronous=False))
        saver.start(
            reader.manifest.step,
            Extras(reader.state(), (Path(checkpoint) / "config.yaml").read_text(), {}, {}),
            wait=True,
        )
    stop_processes()


# Converting ----------------------------------------------------------------------------------------------------------


def convert(checkpoint: Path, dtypes: tuple[str, ...], limit: int, rounds: int) -> list[str]:
    """Seconds and memory of each dtype; `limit` is of the memory above a Python with torch, in bytes; 0: none."""
    bare_peak, bare_data = run_python(BARE)
    weights = [path for path in checkpoint.iterdir() if path.name.startswith("weights-")]
    size = sum(path.stat().st_size for path in weights)
    seconds: dict[str, list[float]] = {name: [] for name in ("cp of the weights", *dtypes)}
    peaks = dict.fromkeys(dtypes, 0)
    certificates = {}
    for _ in range(rounds):
        seconds["cp of the weights"].append(copy_seconds(*weights))
        for dtype in dtypes:
            output = checkpoint.parent / f"model-{dtype}"
            os.sync()
            started = time.perf_counter()
            arguments = ("convert", str(checkpoint), str(output), "--dtype", dtype)
            (peak,) = run_python(LIMITED, str(bare_data + limit if limit else 0), *arguments)
            seconds[dtype].append(time.perf_counter() - started)
            peaks[dtype] = max(peaks[dtype], peak - bare_peak)
            certificates[dtype] = json.loads((output / "certificate.json").read_text())
            shutil.rmtree(output)
    started = time.perf_counter()
    run_python(BARE)
    start_up = time.perf_counter() - started
    cp = statistics.median(seconds["cp of the weights"])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        memory = f"{peaks[name] / MB:.0f}" if name in peaks else ""
        rows.append([name, *figures(values), f"{size / GB / median:.2f}", f"{cp / median:.2f}", memory])
    title = f"convert, {size / GB:.2f} GB of float32 weights"
    lines = [certificate_line(dtype, tree) for dtype, tree in certificates.items()]
    header = [title, "median s", "least", "most", "GB/s", "of cp's speed", "MB above torch"]
    under = f"under RLIMIT_DATA of {limit / MB:.0f} MB above a Python with torch; " if limit else ""
    return [
        table(header, rows),
        f"{under}starting a Python with torch takes {start_up:.1f} s of it",
        "\n".join(lines),
    ]


def certificate_line(dtype: str, tree: dict[str, Any]) -> str:
    """What a certificate says of the loss of rounding."""
    rounding, copy = tree["rounding"], tree["copy"]
    codes = rounding["changed_codes"]
    shares = codes.values() if isinstance(codes, dict) else [codes]
    most = max((value["share"] if isinstance(value, dict) else value for value in shares), default=0.0)
    return (
        f"{dtype}: copy equal in {copy['equal_logits']} logits and {copy['equal_codes']} codes; rounding changed "
        f"at most {most:.2%} of a layer's codes, logits by {rounding['largest_logit_difference']:.3g}, loss "
        f"{rounding['recorded_loss']:.4f} -> {rounding['loss']:.4f}; {len(tree['tensors'])} tensors hashed"
    )


def large(options: argparse.Namespace, folder: Path) -> list[str]:
    """A model that need not fit into memory, converted once under a limit."""
    from mf_train.config.loading import load_config
    from tests.standalone.checkpoints import write_large

    model = replace(load_config(REPOSITORY / options.large).model, sequence_length=128)
    checkpoint = write_large(folder / "large" / "step-000000007", model, 1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    title = f"{options.large}, random weights; the machine has {memory / GB:.1f} GB of memory"
    return [title, *convert(checkpoint, ("bfloat16",), options.limit * 10**6, 1)]


# Shared --------------------------------------------------------------------------------------------------------------


def torchrun(processes: int, arguments: list[str]) -> None:
    machine.run_program(machine.torchrun(processes) + arguments, OMP_NUM_THREADS="1")


def run_python(code: str, *arguments: str) -> list[int]:
    """The numbers in the last line that it prints."""
    said = machine.run_program([sys.executable, "-c", code, *arguments])
    return [int(number) for number in said.splitlines()[-1].split()]


def copy_seconds(*sources: Path) -> float:
    """Of `cp -r` beside the first one, and a sync."""
    target = sources[0].parent / "copied"
    target.mkdir()
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", *sources, target], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def read_seconds(folder: Path) -> float:
    """Of reading all files once."""
    started = time.perf_counter()
    subprocess.run(["sh", "-c", 'cat "$0"/* > /dev/null', folder], check=True)
    return time.perf_counter() - started


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def figures(seconds: list[float]) -> list[str]:
    return [f"{value:.2f}" for value in (statistics.median(seconds), min(seconds), max(seconds))]


if __name__ == "__main__":
    main()
