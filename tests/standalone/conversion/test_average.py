"""The mean of a run's weights at several steps: its values, and that it is a checkpoint like any other."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mf_train.checkpoint.layout import KINDS, resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.verify import verify
from mf_train.cli import main
from mf_train.config import ModelConfig
from mf_train.errors import UserError
from mf_train.standalone.conversion import average as module
from mf_train.standalone.conversion.average import average
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import SINGLE
from tests.standalone.checkpoints import flip, random_weights, write_checkpoint, write_slices
from tests.training.runs import read_metrics, small_config, train, write_text

SMALL = ModelConfig(hidden_size=32, num_layers=1, num_heads=4, bits=4, vocab_size=256, sequence_length=32)


def mean(weights: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: (sum(one[name].double() for one in weights) / len(weights)).float() for name in weights[0]}


def test_a_mean_over_any_degrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of checkpoints that 1, 4 and 2 ranks wrote, in small slices; the moments are the last one's."""
    weights = []
    for number, tensor in enumerate((1, 4, 2), start=1):
        folder = tmp_path / f"run/checkpoints/step-{number:09d}"
        values = {kind: random_weights(SMALL, 3 * number + at) for at, kind in enumerate(KINDS)}
        write_checkpoint(folder, SMALL, values["master"], tensor)
        write_slices(folder, values, tensor, step=number, part_bytes=1 << 16)
        weights.append(values)
    monkeypatch.setattr(module, "SLICE_BYTES", 10_000)
    list(average(tmp_path / "run", [3, 1, 2], tmp_path / "mean"))
    reader = CheckpointReader(tmp_path / "mean")
    assert (reader.manifest.step, reader.manifest.tensor_parallel) == (3, 2)
    expected = mean([one["master"] for one in weights])
    for name in reader.shapes:
        assert torch.equal(reader.read(name), expected[name]), name
        for kind in KINDS[1:]:
            assert torch.equal(reader.read(name, kind), weights[-1][kind][name]), (kind, name)


def test_a_mean_converts_and_is_trained_on(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["checkpoint"] = {"interval": 2, "keep": 0}
    train(tree, "training.steps=8")
    (line, _) = average(tmp_path / "run", [2, 4, 6], tmp_path / "mean")
    assert "the mean of the weights after steps 2, 4, 6; all else as after step 6" in line
    assert "good: step 6" in next(verify(tmp_path / "mean"))
    readers = [CheckpointReader(tmp_path / f"run/checkpoints/step-{step:09d}") for step in (2, 4, 6)]
    expected = mean([{name: reader.read(name) for name in reader.shapes} for reader in readers])
    said = list(convert(tmp_path / "mean", tmp_path / "model"))
    assert any("the largest logit difference from the trainer is 0, and 0 of" in line for line in said)
    held = load_file(tmp_path / "model" / SINGLE)
    assert all(torch.equal(held[PARAMETER_PREFIX + name], value) for name, value in expected.items())
    # with a rate of nothing the next checkpoint has the same weights; moments and batches go on
    tree["checkpoint"] = {"resume": str(tmp_path / "mean")}
    tree["optimizer"] |= {"learning_rate": 1e-30, "weight_decay": 0.0}
    tree["schedule"]["on_change"] = "follow"
    tree["training"] |= {"steps": 8, "output_dir": str(tmp_path / "on")}
    train(tree)
    on, before = read_metrics(tmp_path / "on"), read_metrics(tmp_path / "run")[6:]
    assert [one["batch_digest"] for one in on] == [one["batch_digest"] for one in before]
    assert [one["step"] for one in on] == [7, 8] and on[0]["loss"] != before[0]["loss"]
    last = CheckpointReader(resolve_checkpoint(tmp_path / "on"))
    assert all(torch.equal(last.read(name), value) for name, value in expected.items())
    norms = {name: readers[-1].read(name, "exp_avg").norm() for name in last.shapes}
    assert any(last.read(name, "exp_avg").norm() > 0.5 * norm for name, norm in norms.items() if norm)


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        (["1"], "a mean is of several steps, each given once: 1"),
        (["1", "1"], "a mean is of several steps, each given once: 1, 1"),
        (["1", "5", "9"], "no checkpoint of step 5, 9; there are those of: 1, 2"),
    ],
)
def test_mistakes(steps: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        (tmp_path / f"checkpoints/step-{number:09d}").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", "average", str(tmp_path), *steps, str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_damaged_or_of_another_model_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"checkpoints/step-{number:09d}"
        write_checkpoint(folder, SMALL, random_weights(SMALL, number), 1)
    weights = tmp_path / "checkpoints/step-000000001/weights-0-of-1-part-000.safetensors"
    shutil.copy(weights, tmp_path / "kept")
    flip(weights)
    with pytest.raises(UserError, match=r"step-000000001/weights-0-of-1-part-000.safetensors: damaged"):
        list(average(tmp_path, [1, 2], tmp_path / "out"))
    shutil.move(tmp_path / "kept", weights)
    other = replace(SMALL, num_layers=2)
    write_checkpoint(tmp_path / "checkpoints/step-000000003", other, random_weights(other, 3), 1)
    with pytest.raises(UserError, match=r"step-000000001: of another model than .*step-000000003"):
        list(average(tmp_path, [1, 3], tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}
