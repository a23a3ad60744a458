"""The average of the weights: against float64 by hand, resumed on another shape, dropped, begun anew, converted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mf_train.checkpoint.layout import AVERAGE, KINDS
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.verify import verify
from mf_train.cli import main
from mf_train.config.model import ModelConfig
from mf_train.errors import UserError
from mf_train.model import MemoryFormer
from mf_train.standalone.conversion.check import check_conversion
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import SINGLE
from tests.training.runs import small_config, train, write_text

DECAY = 0.75


def test_of_a_run_that_is_stopped_and_goes_on(tmp_path: Path) -> None:
    """Steps 1 to 3 in one process, of which the second is skipped; 4 and 5 under ZeRO 3 on two ranks; 6 without an
    average; 7 with one that begins at the weights after 6.
    """
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["checkpoint"] = {"interval": 1, "keep": 0}
    tree["data"]["skip_steps"] = [2]
    tree["training"] |= {"average_decay": DECAY, "seed": 3}
    first = train(tree, "training.steps=3")
    more = train(tree, "training.steps=5", "parallel.zero_stage=3", processes=2)
    off = train(tree, "training.steps=6", "training.average_decay=0")
    on = train(tree, "training.steps=7")
    said = [[line for line in run.stdout.splitlines() if "average" in line] for run in (first, more, off, on)]
    dropped = "the checkpoint's average of the weights is dropped: training.average_decay is 0"
    begins = "the average of the weights begins at those of step 6: the checkpoint holds none"
    assert said == [[], [], [dropped], [begins]]

    readers = {step: CheckpointReader(tmp_path / f"run/checkpoints/step-{step:09d}") for step in range(1, 8)}
    assert [readers[step].manifest.format for step in readers] == [3, 3, 3, 3, 3, 2, 3]
    assert readers[6].manifest.kinds == KINDS and readers[7].manifest.kinds == (*KINDS, AVERAGE)
    means: dict[str, Tensor] = {
        name: parameter.detach().double()
        for name, parameter in MemoryFormer(ModelConfig(**tree["model"]), seed=3).named_parameters()
    }
    for step, reader in readers.items():
        for name in reader.shapes:
            weights = reader.read(name).double()
            if step == 6:
                means[name] = weights
                continue
            if step != 2:
                means[name] = DECAY * means[name] + (1 - DECAY) * weights
            error = (reader.read(name, AVERAGE) - means[name]).abs().max()
            assert error <= 1e-6 * weights.abs().max(), (step, name)
            moved = (weights - means[name]).abs().max() > 1e-4
            assert moved or name.endswith("key.bias"), (step, name)

    # converted: the average and nothing else; what is written is proved like any model
    said_by = list(convert(readers[5].checkpoint, tmp_path / "model", average=True))
    assert "the average of the weights of a memoryformer" in said_by[0]
    assert any("difference from the checkpoint's average is 0, and 0 of" in line for line in said_by)
    held = load_file(tmp_path / "model" / SINGLE)
    for name in readers[5].shapes:
        assert torch.equal(held[PARAMETER_PREFIX + name], readers[5].read(name, AVERAGE)), name
    assert "the exponential average of the run's (decay 0.75)" in (tmp_path / "model/README.md").read_text()
    assert "is " in list(check_conversion(readers[5].checkpoint, tmp_path / "model"))[-1]
    with pytest.raises(
        UserError, match="holds no average of the weights: leave --average out, or train with"
    ):
        list(convert(readers[6].checkpoint, tmp_path / "other", average=True))
    assert "step 5, tensor-parallel 1, with an average of the weights" in "".join(
        verify(readers[5].checkpoint)
    )


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    for way in ("--check", "--to-checkpoint"):
        with pytest.raises(SystemExit) as end:
            main(["convert", "there", "here", "--average", way])
        message = capsys.readouterr().err
        assert end.value.code == 2 and "--average" in message and message.count("\n") == 1
