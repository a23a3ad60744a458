"""The scripts of docs/fine-tuning.md, on a small converted model; what they tune goes back into pretraining."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mf_train.config import ModelConfig
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.conversion.to_checkpoint import to_checkpoint
from mf_train.standalone.folder import SINGLE
from tests.models import random_model
from tests.standalone.checkpoints import write_checkpoint

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = dict(
    re.findall(
        r"^```python\n# (\w+\.py)\n(.*?)^```$",
        (REPOSITORY / "docs/fine-tuning.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
)
# a cap, which adapters around the head must leave outside
CONFIG = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=2, bits=4, logit_softcap=20.0, vocab_size=4096, sequence_length=64
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `model`."""
    weights = random_model(CONFIG, 3, torch.float32, std=0.05).state_dict()
    list(convert(write_checkpoint(tmp_path / "checkpoint", CONFIG, weights, tensor=1), tmp_path / "model"))
    return tmp_path


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def run(folder: Path, script: str, *arguments: str) -> list[list[str]]:
    """The lines that a script writes, as words."""
    (folder / script).write_text(SCRIPTS[script], encoding="utf-8")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, script, *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()]


def losses(lines: list[list[str]]) -> list[tuple[float, float]]:
    found = [(float(words[1]), float(words[2])) for words in lines if words and words[0] == "loss"]
    assert found
    return found


def test_adapters(folder: Path) -> None:
    needs("peft")
    lines = run(folder, "adapters.py")
    assert len(losses(lines)) == 3
    # a prompt of eight embeddings teaches a model of random weights little
    for (before, after), fall in zip(losses(lines), (0.2, 0.2, 0.001), strict=True):
        assert after < before - fall
    differences = {
        word: [float(words[1]) for words in lines if words and words[0] == word]
        for word in ("reloaded", "merged")
    }
    assert len(differences["reloaded"]) == 3 and max(differences["reloaded"]) <= 1e-5
    assert len(differences["merged"]) == 2 and max(differences["merged"]) <= 1e-4


@pytest.mark.slow
def test_every_weight_and_the_way_back(folder: Path) -> None:
    needs("accelerate")
    before, after = losses(run(folder, "full.py"))[0]
    assert after < before - 2
    again = losses(run(folder, "full.py"))[0]  # from the last checkpoint, which has no steps left
    assert again[1] == pytest.approx(after, abs=1e-4)
    shutil.copy(folder / "model" / "tokenizer.model", folder / "tuned")
    list(to_checkpoint(folder / "tuned", folder / "start", 1))
    list(convert(folder / "start", folder / "back"))
    tuned, back = (load_file(folder / name / SINGLE) for name in ("tuned", "back"))
    assert tuned.keys() == back.keys() and all(torch.equal(tuned[name], back[name]) for name in tuned)


@pytest.mark.slow
def test_a_loop(folder: Path) -> None:
    needs("accelerate")
    before, after = losses(run(folder, "loop.py"))[0]
    assert after < before - 1


@pytest.mark.slow
def test_chats(folder: Path) -> None:
    needs("trl", "datasets")
    lines = run(folder, "chat.py")
    before, after = losses(lines)[0]
    assert after < before - 1
    assert "<|user|>How many are 3 and 3?<|end|><|assistant|>" in " ".join(lines[-1])
