"""Steps whose update is left out: the rule against numpy, and whole runs with listed, NaN and outstanding steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mf_train.checkpoint.layout import KINDS, STATE
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config, ModelConfig
from mf_train.config.loading import parse_config
from mf_train.data.tokenizer import Tokenizer
from mf_train.training.bad_steps import SPIKES_IN_A_ROW, WINDOW, BadSteps
from tests.standalone.checkpoints import random_weights, renew_manifest, write_checkpoint
from tests.training.runs import TOKENIZER, read_metrics, small_config, train, write_text

FACTOR = 3.0


def settings(**training: float) -> Config:
    return parse_config({"training": training, "data": {"skip_steps": [2, "5-6"]}}, "test")


def bound(values: list[float]) -> float:
    """The rule, by numpy."""
    last = np.array(values[-WINDOW:])
    middle = np.median(last)
    return float(middle + FACTOR * 1.4826 * np.median(np.abs(last - middle)))


def test_what_stands_out_and_a_restart_at_every_step() -> None:
    random = np.random.default_rng(7)
    steps, config = BadSteps(settings(), {}), settings(skip_spikes=FACTOR)
    losses, norms, skipped = [], [], {"loss": 0, "gradient norm": 0}
    for step in range(7, 400):
        loss, norm = (float(value) for value in random.standard_t(3, 2) + np.array([9, 20]))
        expected = None
        if len(losses) >= WINDOW // 2:
            # switched on with a restart, the rule knows the steps before it
            steps = BadSteps(config, json.loads(json.dumps(steps.state())))
            over = [loss > bound(losses), norm > bound(norms)]
            expected = ["loss", "gradient norm"][over.index(True)] if any(over) else None
        bad = steps.judge(step, loss, norm)
        assert (bad is None) == (expected is None)
        if bad is None:
            losses, norms = [*losses, loss], [*norms, norm]
        else:
            skipped[str(expected)] += 1
            assert bad.reason.startswith(f"{expected} is ") and not bad.ends
    assert min(skipped.values()) > 5


def test_what_is_listed_and_how_many_in_a_row_end_a_run() -> None:
    steps = BadSteps(settings(skip_nonfinite=2), {})
    found = [steps.judge(step, float("nan"), 1.0) for step in range(1, 8)]
    listed = [step for step, bad in enumerate(found, 1) if bad and "data.skip_steps" in bad.reason]
    assert listed == [2, 5, 6] and [bool(bad and bad.ends) for bad in found] == [False] * 3 + [True] + [
        False
    ] * 2 + [True]
    assert steps.judge(8, 1.0, 1.0) is None and steps.judge(9, 1.0, float("inf")) == (
        "gradient norm is inf",
        False,
    )
    steps = BadSteps(settings(skip_spikes=FACTOR), {"losses": [1.0] * 64, "norms": [1.0] * 64})
    found = [steps.judge(step, 2.0, 1.0) for step in range(7, 8 + SPIKES_IN_A_ROW)]
    assert [bool(bad and bad.ends) for bad in found] == [False] * SPIKES_IN_A_ROW + [True]


FIRST, LAST, LISTED, NAN = 8, 19, 10, 17  # steps; the checkpoint that runs start from is step 7's
# as a run leaves them: the first norms, which are about 2.2, are above their bound
BEFORE = {"losses": [9.9, 10.1] * 32, "norms": [1.9, 2.0] * 32}


def start_of_runs(folder: Path) -> Path:
    """A checkpoint in whose embedding the row of one token, which stands in one document, is NaN."""
    text = write_text(folder / "text.jsonl")
    with text.open("a") as file:
        file.write(json.dumps({"text": "The zebra."}) + "\n")
    tokenizer = Tokenizer(TOKENIZER)
    rare = set(tokenizer.encode(" zebra")) - set(tokenizer.encode(text.read_text().replace("zebra", "")))
    config = ModelConfig(**small_config(folder, text)["model"])
    weights = random_weights(config, 0)
    weights["embedding.weight"][sorted(rare)] = torch.nan
    checkpoint = write_checkpoint(folder / "checkpoint", config, weights, 2)
    state = json.loads((checkpoint / STATE).read_text())
    state["bad_steps"] = BEFORE
    (checkpoint / STATE).write_text(json.dumps(state))
    renew_manifest(checkpoint)
    return checkpoint


def tree_of(folder: Path, checkpoint: Path, skip_steps: list[int], stage: int, tensor: int) -> dict[str, Any]:
    tree = small_config(folder, checkpoint.parent / "text.jsonl")
    tree["data"]["skip_steps"] = skip_steps
    tree["training"] |= {"skip_nonfinite": 1, "skip_spikes": FACTOR, "steps": LAST, "validation_sequences": 0}
    tree["schedule"]["on_change"] = "follow"
    tree["parallel"] = {"zero_stage": stage, "tensor": tensor}
    tree["checkpoint"] = {"resume": str(checkpoint), "interval": 1, "keep": 0}
    return tree


def read(run: Path, step: int) -> CheckpointReader:
    return CheckpointReader(run / "checkpoints" / f"step-{step:09d}")


def assert_equal(one: CheckpointReader, other: CheckpointReader) -> None:
    for kind in KINDS:
        for name in one.shapes:
            torch.testing.assert_close(
                one.read(name, kind), other.read(name, kind), rtol=0, atol=0, equal_nan=True
            )


@pytest.mark.distributed
def test_skipped_steps_change_nothing_and_a_restart_after_one_is_exact(tmp_path: Path) -> None:
    """One run on two ranks; the other is given the NaN step's number, and stops there: on one rank, then on two."""
    checkpoint = start_of_runs(tmp_path)
    done = train(tree_of(tmp_path / "one", checkpoint, [LISTED], stage=2, tensor=2), processes=2)
    other = tree_of(tmp_path / "other", checkpoint, [LISTED, NAN], stage=1, tensor=1)
    train(other, f"training.steps={NAN}")
    train(other | {"parallel": {"zero_stage": 0, "tensor": 2}}, processes=2)

    metrics, others = (read_metrics(tmp_path / name) for name in ("one", "other"))
    keys = ("step", "tokens", "loss", "grad_norm", "batch_digest", "skipped_steps")
    assert [[entry.get(key) for key in keys] for entry in metrics] == [
        [entry.get(key) for key in keys] for entry in others
    ]
    losses, norms, skipped = [*BEFORE["losses"]], [*BEFORE["norms"]], []
    for entry in metrics:
        loss, norm, reason = entry["loss"], entry["grad_norm"], entry.get("skipped")
        assert (entry["tokens_per_second"] == 0) == (entry["step"] == LISTED)
        if entry["step"] == LISTED:
            assert reason == "in data.skip_steps" and loss is None
        elif entry["step"] == NAN:
            assert reason == "loss is nan" and loss is norm is None
        elif norm > bound(norms):
            assert reason is not None and reason.startswith(f"gradient norm is {norm:.6g}, above ")
        else:
            assert reason is None and loss < bound(losses)
            losses, norms = [*losses, loss], [*norms, norm]
        if reason is not None:
            skipped.append(entry["step"])
            line = f"step {entry['step']}: not trained on batch {entry['batch_digest']}: {reason}"
            assert f"{line}; steps skipped so far: {len(skipped)}\n" in done.stdout
    assert len(skipped) >= 4 and len(metrics) == LAST - FIRST + 1

    for step in skipped:
        before = checkpoint if step == FIRST else read(tmp_path / "one", step - 1).checkpoint
        assert_equal(CheckpointReader(before), read(tmp_path / "one", step))
    ends = [read(tmp_path / name, LAST) for name in ("one", "other")]
    assert_equal(*ends)
    states = [end.state() for end in ends]
    assert (
        states[0]["bad_steps"] == states[1]["bad_steps"] == {"losses": losses, "norms": norms, "in_a_row": 0}
    )
    assert states[0]["skipped_steps"] == states[1]["skipped_steps"] == len(skipped)
