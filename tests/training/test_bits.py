"""A run has the same bits for every number of tensor-parallel ranks, and a restart may change it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mf_train.checkpoint.layout import resolve_checkpoint
from tests.checkpoint.elastic import whole_tensors
from tests.training.runs import REPOSITORY, read_metrics, small_config, train, write_text

pytestmark = pytest.mark.distributed

STEPS = 5
Numbers = list[tuple[float, float, str]]
Held = tuple[str, str, str]  # first and second moments of tables, masters
PLAIN = ("float32", "float32", "float32")


def configuration(folder: Path, precision: str, norm: str, held: Held) -> dict[str, Any]:
    tree = small_config(folder, write_text(folder.parent / "text.jsonl"))
    tree["model"] |= {"hidden_size": 64, "num_heads": 8, "norm": norm}
    tree["training"] |= {"steps": STEPS, "precision": precision, "validation_sequences": 0}
    tree["data"] |= {"validation": [], "workers": 0}
    tree["optimizer"] |= {"table_exp_avg": held[0], "table_exp_avg_sq": held[1]}
    tree["parallel"] = {"master": held[2]}
    return tree


def run(tree: dict[str, Any], tensor: int, steps: int = STEPS) -> str:
    """What it printed."""
    tree.setdefault("parallel", {})["tensor"] = tensor
    tree["training"]["steps"] = steps
    return train(tree, processes=tensor).stdout


def numbers_of(folder: Path) -> Numbers:
    return [(line["loss"], line["grad_norm"], line["batch_digest"]) for line in read_metrics(folder)]


def assert_same_run(folder: Path, tensor: int, one: Path) -> None:
    """Losses, norms, masters and both moments."""
    assert numbers_of(folder) == numbers_of(one)
    ours = whole_tensors(resolve_checkpoint(folder), tensor)
    expected = whole_tensors(resolve_checkpoint(one), 1)
    for kind, tensors in expected.items():
        for name, values in tensors.items():
            assert torch.equal(ours[kind][name], values), (kind, name)


KINDS: list[tuple[str, str, Held]] = [
    ("float32", "layernorm", PLAIN),
    ("bfloat16", "layernorm", ("int8", "int8", "split")),
    ("float32", "rmsnorm", ("bfloat16", "row", "float32")),
    ("bfloat16", "rmsnorm", PLAIN),
]


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, Held], Path]:
    """The folder of the run of one process."""

    @functools.cache
    def of(precision: str, norm: str, held: Held) -> Path:
        folder = tmp_path_factory.mktemp("one") / "run"
        run(configuration(folder, precision, norm, held), 1)
        return folder

    return of


FAST = {(*KINDS[0], 4), (*KINDS[1], 2), (*KINDS[2], 2)}


@pytest.mark.parametrize(
    ("precision", "norm", "held", "tensor"),
    [
        pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow])
        for case in ((*kind, tensor) for kind in KINDS for tensor in (2, 4, 8))
    ],
)
def test_the_same_bits(
    precision: str, norm: str, held: Held, tensor: int, ones: Callable[[str, str, Held], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(configuration(folder, precision, norm, held), tensor)
    assert_same_run(folder, tensor, ones(precision, norm, held))


@pytest.mark.parametrize(
    "kind", [KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)], ids=["plain", "int8"]
)
def test_a_restart_may_change_them(
    kind: tuple[str, str, Held], ones: Callable[[str, str, Held], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    tree = configuration(folder, *kind)
    for tensor, steps in ((2, 1), (1, 3), (4, STEPS)):
        run(tree, tensor, steps)
    assert_same_run(folder, 4, ones(*kind))


def test_a_restart_may_hold_moments_otherwise(tmp_path: Path) -> None:
    """What is kept and how it is held is said once, when it is converted."""
    folder = tmp_path / "run"
    tree = configuration(folder, "bfloat16", "layernorm", PLAIN)
    run(tree, 1, 2)
    tree["optimizer"] |= {"table_exp_avg": "bfloat16", "table_exp_avg_sq": "row"}
    tree["parallel"]["master"] = "split"
    converted = run(tree, 2, 4)
    assert (
        "converted what the checkpoint holds: optimizer.table_exp_avg float32 to bfloat16, "
        "optimizer.table_exp_avg_sq float32 to row, parallel.master float32 to split\n"
    ) in converted
    again = run(tree, 1, 5)
    assert "resumed after step 4" in again and "converted" not in again
    losses = [loss for loss, _, _ in numbers_of(folder)]
    assert len(losses) == 5 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_fifty_steps_of_the_quickstart(precision: str, tmp_path: Path) -> None:
    """At its own rate, where a code that flips shows in the next loss."""
    tree = yaml.safe_load((REPOSITORY / "configs" / "quickstart.yaml").read_text())
    tree["training"] |= {"steps": 50, "precision": precision, "validation_interval": 0}
    tree["schedule"] = {"warmup_steps": 3}
    tree["checkpoint"] = {"interval": 0}
    for tensor in (1, 2, 4):
        tree["training"]["output_dir"] = str(tmp_path / f"run-{tensor}")
        run(tree, tensor, 50)
        assert_same_run(tmp_path / f"run-{tensor}", tensor, tmp_path / "run-1")
