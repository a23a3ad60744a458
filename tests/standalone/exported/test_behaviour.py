"""A converted model beside a model of transformers' own, with this project and without: see behaviour.py."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_train.config import ModelConfig
from mf_train.standalone.conversion.convert import convert
from tests.standalone.checkpoints import random_weights, write_checkpoint

SCRIPT = Path(__file__).with_name("behaviour.py")
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]
CONFIG = ModelConfig(
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    bits=4,
    expand_bits=1,
    rotary_fraction=0.5,
    qk_norm=True,
    logit_softcap=2.0,
    vocab_size=4096,
    sequence_length=48,
)

Report = dict[str, str | None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A float32 and an int8 model of the same random weights."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = write_checkpoint(folder / "checkpoint", CONFIG, random_weights(CONFIG, seed=11), tensor=1)
    list(convert(checkpoint, folder / "model"))
    list(convert(checkpoint, folder / "int8", dtype="int8"))
    return [str(folder / "model"), str(folder / "int8")]


@pytest.fixture(scope="module", params=["alone", "beside"])
def report(
    request: pytest.FixtureRequest,
    folders: list[str],
    bare_environment: Callable[[list[str]], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Report:
    """What the script finds where this project is not installed, and where it is."""
    folder = tmp_path_factory.mktemp("report")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    if request.param == "alone":
        python, modules = str(bare_environment(["torch", "transformers", "safetensors"])), []
    else:
        python, modules = sys.executable, ["mf_train.kernels"]
        environment |= {"PYTHONPATH": str(SCRIPT.parents[3]), "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    done = subprocess.run(
        [python, "-P", str(SCRIPT), *folders, str(folder / "report.json"), *modules],
        cwd=folder,
        env=environment | {"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: Report = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_it_behaves_as_other_models_do(report: Report, check: str) -> None:
    assert report[check] is None, report[check]
