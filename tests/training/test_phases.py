"""A run whose data, batch, rows and schedule change at two borders: it goes on from anywhere as if never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import read_metrics, small_config, train, write_text

pytestmark = pytest.mark.distributed

SAME = ("step", "phase", "tokens", "loss", "grad_norm", "learning_rate", "batch_digest", "epochs")
RAMP, ANNEAL = 4, 8  # the last steps before these phases
STEPS = 11


def phased(folder: Path) -> dict[str, Any]:
    """The texts are beside the run's folder."""
    tree = small_config(folder, folder.parent / "text.jsonl")
    added = [{"path": str(folder.parent / name)} for name in ("text.jsonl", "added.jsonl")]
    tree["schedule"] = {"kind": "cosine", "warmup_steps": 2}
    tree["training"] |= {"steps": STEPS, "validation_interval": 6, "skip_spikes": 6}
    tree["checkpoint"] = {"interval": 2, "keep": 0}
    tree["phases"] = [
        {
            "name": "ramp",
            "start": RAMP + 1,
            "training": {"global_batch_size": 12, "micro_batch_size": 3},
            "optimizer": {"betas": [0.9, 0.99]},
        },
        {
            "name": "anneal",
            "start": ANNEAL + 1,
            "data": {"train": added},
            "model": {"sequence_length": 48},
            "schedule": {"kind": "linear", "warmup_steps": 0, "minimum_fraction": 0},
            "optimizer": {"learning_rate": 1e-3},
        },
    ]
    return tree


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in SAME} for record in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("phases") / "run"
    write_text(folder.parent / "text.jsonl")
    write_text(folder.parent / "added.jsonl", 15)
    done = train(phased(folder))
    assert (
        "phase 'anneal': steps 9 to 11; learning rate 3e-05 to 0.0006667, sequences a step 12 to 12, tokens a sequence "
        "32 to 48; changed: model.sequence_length, data.train, optimizer.learning_rate, schedule.kind, "
    ) in done.stdout
    return folder


def go_on(whole: Path, name: str, step: int, tree: dict[str, Any], processes: int = 1) -> tuple[Path, str]:
    """Another run from the whole run's checkpoint of a step, as if that had been killed; its folder and its lines."""
    folder = whole.parent / name
    shutil.copytree(whole, folder)
    tree["training"]["output_dir"] = str(folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder, train(tree, processes=processes).stdout


def test_metrics_name_the_phase_and_count_on(whole: Path) -> None:
    records = read_metrics(whole)
    assert [each["phase"] for each in records] == ["main"] * 4 + ["ramp"] * 4 + ["anneal"] * 3
    sizes = [8 * 32] * 4 + [12 * 32] * 4 + [12 * 48] * 3
    assert [each["tokens"] for each in records] == [sum(sizes[: step + 1]) for step in range(STEPS)]
    assert [step + 1 for step, each in enumerate(records) if "validation_loss" in each] == [4, 6, 8, 11]
    assert not any("resumed_after" in each for each in records)
    rates = [each["learning_rate"] for each in records]
    assert rates[8:] == pytest.approx([1e-3 * 2 / 3, 1e-3 / 3, 0]) and max(rates[:4]) == 3e-3
    # the text of the first phases is read on, and what was added begins
    epochs = [each["epochs"] for each in records]
    assert epochs[8][0] >= epochs[7][0] >= epochs[3][0] > 0 and epochs[8][1] < 0.2
    state = json.loads((whole / "checkpoints" / "step-000000010" / "state.json").read_text())
    assert state["step"] == 10 and state["stream"]["step"] == 2 and len(state["bad_steps"]["losses"]) == 2


@pytest.mark.parametrize("step", [RAMP, RAMP + 2, ANNEAL])
def test_the_same_shape_goes_on_to_the_last_bit(whole: Path, step: int) -> None:
    folder, said = go_on(whole, f"bits-{step}", step, phased(whole))
    assert f"resumed after step {step} from" in said
    assert numbers(folder) == numbers(whole)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        name = f"checkpoints/step-{STEPS:09d}/{kind}-0-of-1-part-000.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("step", "processes", "parallel"),
    [
        (RAMP, 2, {"tensor": 2, "zero_stage": 1}),
        (ANNEAL, 2, {"tensor": 1, "zero_stage": 3}),
        (RAMP + 2, 3, {"tensor": 1, "zero_stage": 2}),
    ],
)
def test_another_shape_goes_on_with_the_same_batches(
    whole: Path, step: int, processes: int, parallel: dict[str, int]
) -> None:
    tree = phased(whole) | {"parallel": parallel}
    folder, _ = go_on(whole, f"shape-{processes}-{step}", step, tree, processes)
    for there, here in zip(numbers(whole), numbers(folder), strict=True):
        for key in ("loss", "grad_norm"):
            assert here.pop(key) == pytest.approx(there.pop(key), rel=2e-5)
        assert here == there
