"""Whole runs: metrics, resume, stopping on request, other shapes, what ends a run."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mf_train.checkpoint.layout import list_checkpoints, resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.data.tokenizer import Tokenizer
from tests.training.runs import (
    TOKENIZER,
    complaints,
    has_steps,
    read_metrics,
    small_config,
    start,
    train,
    wait_for,
    write_text,
)

STEPS, MIDDLE = 12, 6


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run in one process with checkpoints at steps 6 and 12."""
    folder = tmp_path_factory.mktemp("reference")
    tree = small_config(folder / "run", write_text(folder / "text.jsonl"))
    tree["training"]["validation_interval"] = MIDDLE
    tree["logging"] = {"tensorboard": True, "interval": 1, "telemetry_interval": 4}
    settings = (f"training.steps={STEPS}", f"checkpoint.interval={MIDDLE}", "checkpoint.keep=0")
    done = train(tree, *settings, cold=True)
    assert "ZeRO 1" in done.stdout and f"step {STEPS}/{STEPS}" in done.stdout
    assert not done.stderr, done.stderr
    return folder / "run"


def tree_beside(reference: Path, folder: Path) -> dict[str, Any]:
    """The reference's configuration, writing elsewhere."""
    tree: dict[str, Any] = yaml.safe_load((reference.parent / "run.yaml").read_text())
    tree["training"] |= {"steps": STEPS, "output_dir": str(folder), "validation_interval": 0}
    tree["logging"] = {"tensorboard": False}
    return tree


def test_metrics_hold_what_the_interface_promises(reference: Path) -> None:
    metrics = read_metrics(reference)
    assert [entry["step"] for entry in metrics] == list(range(1, STEPS + 1))
    keys = {
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "learning_rate",
        "step_seconds",
        "tokens_per_second",
        "data_wait_seconds",
        "batch_digest",
        "tensor_parallel_bytes_per_token",
        "peak_memory_bytes",
        "paper_flops",
        "model_flops",
        "bytes_moved",
        "flops_share",
        "bandwidth_share",
        "data_parallel_bytes_per_token",
    }
    for entry in metrics:
        assert keys <= set(entry)
        assert entry["tokens"] == entry["step"] * 8 * 32
        # 256 tokens of 2 blocks: 2 S D for attention, 6 K D for memory layers; D 32, K 8, S 32; and the LM head
        assert entry["paper_flops"] == 256 * 2 * (2 * 32 * 32 + 6 * 8 * 32)
        assert entry["model_flops"] == 6 * (entry["paper_flops"] + 256 * 32 * 4096)
        assert entry["flops_share"] is None and entry["bandwidth_share"] is None  # a CPU
        assert len(entry["batch_digest"]) == 16 and int(entry["batch_digest"], 16) >= 0
        assert ("validation_loss" in entry) == (entry["step"] in (MIDDLE, STEPS))
        assert ("tables" in entry) == (entry["step"] % 4 == 0)
    assert len({entry["batch_digest"] for entry in metrics}) == STEPS
    assert [entry["learning_rate"] for entry in metrics[:3]] == [1.5e-3, 3e-3, 3e-3]
    assert metrics[0]["loss"] == pytest.approx(math.log(4096), rel=0.02)  # small weights: near uniform
    tables = metrics[3]["tables"]
    assert set(tables) == {f"blocks.{b}.hash_{h}" for b in range(2) for h in ("attention", "ffn", "inner")}
    for report in tables.values():
        assert (
            0 < report["rows_read"] <= 1 and 0 < report["entropy"] <= 1 and 0 < report["largest_share"] <= 1
        )


def test_run_folder(reference: Path) -> None:
    assert (reference / "checkpoints" / "latest").read_text() == "step-000000012\n"
    assert [path.name for path in list_checkpoints(reference / "checkpoints")] == [
        "step-000000006",
        "step-000000012",
    ]
    recorded = yaml.safe_load((reference / "config.yaml").read_text())
    assert recorded["model"]["rotary_fraction"] == 0.25  # defaults are resolved
    assert (
        recorded["versions"]["torch"] == torch.__version__.partition("+")[0] or recorded["versions"]["torch"]
    )
    assert list((reference / "tensorboard").glob("events.*"))


def test_validation_sets(reference: Path, tmp_path: Path) -> None:
    """One of them is the reference's, whose loss does not change; of the other, numbers by hand."""
    other = write_text(tmp_path / "other.jsonl", 9)
    tree = tree_beside(reference, tmp_path / "run")
    tree["data"]["validation"] += [{"path": str(other), "name": "other", "weight": 0.75}]
    tree["training"] |= {
        "validation_interval": STEPS,
        "validation_sequences": 9,
    }  # 5, as the reference has, and 4
    tree["checkpoint"] = {"resume": str(reference / "checkpoints" / "step-000000006")}
    done = train(tree, "logging.tensorboard=true")
    last, expected = (read_metrics(folder)[-1] for folder in (tmp_path / "run", reference))
    first, second = last["validation"].values()
    assert first == expected["validation"]["0"] and first["loss"] == expected["validation_loss"]
    assert list(last["validation"]) == ["0", "other"] and second["loss"] != first["loss"]
    assert last["validation_loss"] == pytest.approx((first["loss"] + 0.75 * second["loss"]) / 1.75, rel=1e-12)
    tokenizer = Tokenizer(TOKENIZER)
    ids = [i for text in map(json.loads, other.open()) for i in [*tokenizer.encode(text["text"]), 0]][
        : 4 * 32 + 1
    ]
    size = len(tokenizer.decode([i for i in ids[1:] if i]).encode())
    assert second["bits_per_byte"] == pytest.approx(second["loss"] * 4 * 32 / size / math.log(2), rel=1e-12)
    assert second["perplexity"] == pytest.approx(math.exp(second["loss"]), rel=1e-12)
    assert f"validation on other: 4 sequences, {4 * 32} tokens" in done.stdout
    shown = f"other: loss {second['loss']:.4f}, perplexity {second['perplexity']:.2f}, "
    assert f"{shown}{second['bits_per_byte']:.4f} bits a byte\n" in done.stdout
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.*")
    assert b"validation/bits_per_byte/other" in events.read_bytes()


def test_a_finished_run_started_again_does_nothing(reference: Path) -> None:
    before = (reference / "metrics.jsonl").read_bytes()
    tree: dict[str, Any] = yaml.safe_load((reference.parent / "run.yaml").read_text())
    done = train(tree, f"training.steps={STEPS}")
    assert "nothing to do" in done.stdout
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_resume_is_exact_after_a_lost_end(reference: Path, tmp_path: Path) -> None:
    """A run cut off after its first checkpoint, with lines written after it and a torn last one."""
    folder = tmp_path / "run"
    shutil.copytree(reference, folder)
    shutil.rmtree(folder / "checkpoints" / "step-000000012")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:9]) + lines[9][:25])
    train(tree_beside(reference, folder))
    ours, theirs = read_metrics(folder), read_metrics(reference)
    assert [entry["step"] for entry in ours] == list(range(1, STEPS + 1))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine["loss"] == expected["loss"]  # every bit
        assert mine["grad_norm"] == expected["grad_norm"]
        assert mine["batch_digest"] == expected["batch_digest"]
    assert_equal_checkpoints(folder, reference)


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    readers = [CheckpointReader(resolve_checkpoint(folder)) for folder in (one, other)]
    for name in readers[0].shapes:
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            assert torch.equal(*(reader.read(name, kind) for reader in readers)), (name, kind)


@pytest.mark.parametrize(
    ("tensor", "data", "stage"),
    [pytest.param(1, 2, 2, marks=pytest.mark.slow), pytest.param(2, 1, 0, marks=pytest.mark.slow), (2, 2, 3)],
)
def test_resume_on_another_shape(reference: Path, tmp_path: Path, tensor: int, data: int, stage: int) -> None:
    checkpoint = reference / "checkpoints" / "step-000000006"
    tree = tree_beside(reference, tmp_path / "run")
    tree["parallel"] = {"tensor": tensor, "zero_stage": stage}
    tree["checkpoint"] = {"resume": str(checkpoint)}
    train(tree, processes=tensor * data)
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(reference)[MIDDLE:]
    assert [entry["step"] for entry in ours] == list(range(MIDDLE + 1, STEPS + 1))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine["batch_digest"] == expected["batch_digest"]
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert (mine["tensor_parallel_bytes_per_token"] > 0) == (tensor > 1)
    # and back again: what a sharded run wrote restarts in one process
    again = tree_beside(reference, tmp_path / "again")
    again["training"]["steps"] = STEPS + 1
    again["checkpoint"] = {"resume": str(tmp_path / "run")}
    train(again)
    assert read_metrics(tmp_path / "again")[0]["step"] == STEPS + 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_exits_75(reference: Path, tmp_path: Path, number: signal.Signals) -> None:
    tree = tree_beside(reference, tmp_path / "run")
    tree["training"]["steps"] = 2000
    process = start(tree, cold=True)
    wait_for(lambda: has_steps(tree, 3))
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    stopped = len(read_metrics(tmp_path / "run"))
    assert f"stopped on request after step {stopped}" in output
    assert CheckpointReader(resolve_checkpoint(tmp_path / "run")).manifest.step == stopped
    tree["training"]["steps"] = stopped + 2
    train(tree)
    ours, theirs = read_metrics(tmp_path / "run"), read_metrics(reference)
    assert [entry["step"] for entry in ours] == list(range(1, stopped + 3))
    for mine, expected in zip(ours, theirs, strict=False):
        assert mine["loss"] == expected["loss"]


def test_a_signal_before_the_first_step_leaves_nothing_to_save(reference: Path, tmp_path: Path) -> None:
    tree = tree_beside(reference, tmp_path / "run")
    process = start(tree)
    wait_for((tmp_path / "run/checkpoints/.writer").exists, every=0.001)
    process.send_signal(signal.SIGTERM)  # the engine is not built yet
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert "stopped on request after step 0" in output
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    train(tree)
    assert read_metrics(tmp_path / "run")[0]["loss"] == read_metrics(reference)[0]["loss"]


def test_a_nan_loss_stops_the_run(reference: Path, tmp_path: Path) -> None:
    tree = tree_beside(reference, tmp_path / "run")
    tree["optimizer"] = {"learning_rate": 1e30, "gradient_clip": 0.0}
    tree["training"]["skip_nonfinite"] = 2
    done = train(tree, "checkpoint.interval=1", "schedule.warmup_steps=5", processes=2, expect=1)
    (line,) = complaints(done)
    metrics = read_metrics(tmp_path / "run")
    step = metrics[-1]["step"] + 1
    assert line.startswith(f"memoryformer: step {step}: ")
    assert "is nan" in line or "is inf" in line
    assert f"last good checkpoint: {tmp_path}/run/checkpoints/step-{step - 1:09d}" in line
    assert "(batch " in line
    assert ") after 2 skipped in a row; " in line
    assert ["skipped" in entry for entry in metrics] == [entry["loss"] is None for entry in metrics]
    assert [entry["loss"] is None for entry in metrics] == [False] * (len(metrics) - 2) + [True] * 2


def test_kernels_of_the_backend_that_is_asked_for(reference: Path, tmp_path: Path) -> None:
    tree = tree_beside(reference, tmp_path / "run")
    done = train(tree, "kernels.backend=triton", "training.device=cpu", processes=2, expect=2)
    (line,) = complaints(done)
    assert "kernels.backend is triton" in line and line.endswith("set kernels.backend=auto")
    assert not (tmp_path / "run").exists()
    done = train(tree, "kernels.backend=composition", "training.steps=1")
    assert "hash and lookup: torch operations, slower: kernels.backend is composition" in done.stdout
    first, expected = read_metrics(tmp_path / "run")[0], read_metrics(reference)[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_keeps_the_last_checkpoint(reference: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    try:
        tree = tree_beside(reference, disk / "run")
        done = train(tree, "checkpoint.interval=2", "checkpoint.keep=0", processes=2, expect=1)
        (line,) = complaints(done)
        assert "No space left" in line and "the newest complete one is step-" in line
        complete = list_checkpoints(disk / "run" / "checkpoints")
        assert complete and complete[-1].name in line
        for path in complete:
            CheckpointReader(path)
        assert {path.name for path in (disk / "run" / "checkpoints").iterdir()} == {
            ".writer",
            "latest",
            *(path.name for path in complete),
        }
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_resume_in_bfloat16_is_exact_on_the_same_shape(reference: Path, tmp_path: Path, stage: int) -> None:
    tree = tree_beside(reference, tmp_path / "whole")
    tree["training"] |= {"steps": 4, "precision": "bfloat16"}
    tree["parallel"] = {"zero_stage": stage}
    done = train(tree, "checkpoint.interval=2", processes=2, cold=True)
    # the summary, steps 1 and 4, the end: nothing that DeepSpeed prints or warns about
    assert len(done.stdout.splitlines()) == 3 + 2 + 1 and not done.stderr, done.stdout + done.stderr
    again = tree | {"checkpoint": {"resume": str(tmp_path / "whole/checkpoints/step-000000002")}}
    again["training"] = tree["training"] | {"output_dir": str(tmp_path / "again")}
    train(again, processes=2)
    ours, theirs = read_metrics(tmp_path / "again"), read_metrics(tmp_path / "whole")[2:]
    assert [entry["loss"] for entry in ours] == [entry["loss"] for entry in theirs]
    assert [entry.get("resumed_after") for entry in theirs + ours] == [None, None, 2, None]
    assert_equal_checkpoints(tmp_path / "again", tmp_path / "whole")


def test_a_deterministic_run_has_a_plain_run_s_losses_on_a_cpu(reference: Path, tmp_path: Path) -> None:
    """There every operation of a run is deterministic, and torch knows it of each."""
    folder = tmp_path / "run"
    tree = small_config(folder, reference.parent / "text.jsonl")
    tree["training"] |= {"deterministic": True, "steps": 3}
    train(tree)
    tree["training"] |= {"deterministic": False, "output_dir": str(tmp_path / "plain")}
    train(tree)
    first, second = read_metrics(folder), read_metrics(tmp_path / "plain")
    assert [line["loss"] for line in first] == [line["loss"] for line in second]
