"""Peak memory of `memoryformer convert`, measured by the system on a model that does not fit into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.memory import BARE, LIMITED
from mf_train.config import ModelConfig
from mf_train.config.loading import load_config
from tests.processes import run_python
from tests.standalone.checkpoints import write_large
from tests.training.runs import REPOSITORY

LIMIT = 600e6  # bytes above a Python that has imported torch
SMALL_LIMIT = 400e6
# 0.17 B parameters, 0.7 GB in float32: one table layer of it is as large as one of tiny's
SMALL = ModelConfig(
    hidden_size=512, num_layers=2, num_heads=8, bits=8, vocab_size=32_768, sequence_length=256
)
WIDE = ModelConfig(hidden_size=32, num_layers=1, num_heads=4, bits=2, vocab_size=262_144, sequence_length=128)


def numbers(code: str, *arguments: object) -> list[int]:
    """Those in the last line that it prints."""
    return [int(number) for number in run_python(code, *arguments).splitlines()[-1].split()]


@pytest.fixture(scope="module")
def bare() -> tuple[int, int]:
    """Peak resident and writable private memory of a Python that has imported torch, in bytes."""
    peak, data = numbers(BARE)
    return peak, data


def check(checkpoint: Path, folder: Path, bare: tuple[int, int], limit: float) -> None:
    """Both directions, twice: what the peak was, and under a limit of the system's that makes more an error."""
    weights = sum(path.stat().st_size for path in checkpoint.glob("weights-*"))
    assert weights > 1.5 * limit
    model, back = folder / "model", folder / "back"
    for name, arguments in {
        "convert": [str(checkpoint), str(model), "--dtype", "float32"],
        "check": [str(checkpoint), str(model), "--check"],
        "to-checkpoint": [str(model), str(back), "--to-checkpoint", "--tensor", "2"],
    }.items():
        (peak,) = numbers(LIMITED, 0, "convert", *arguments)
        assert peak - bare[0] < limit, f"{name}: {(peak - bare[0]) / 1e6:.0f} MB above import torch"
    for dtype in ("bfloat16", "int8"):
        numbers(
            LIMITED,
            str(bare[1] + int(limit)),
            "convert",
            str(checkpoint),
            str(folder / dtype),
            "--dtype",
            dtype,
        )


@pytest.mark.slow
def test_a_model_that_does_not_fit(tmp_path: Path, bare: tuple[int, int]) -> None:
    check(write_large(tmp_path / "step-000000007", SMALL, 1), tmp_path, bare, SMALL_LIMIT)


def test_a_large_vocabulary(tmp_path: Path, bare: tuple[int, int]) -> None:
    """What grows with it is the logits, and they are bounded by fewer tokens of the probe."""
    checkpoint = write_large(tmp_path / "step-000000007", WIDE, 1)
    for dtype in ("float32", "bfloat16"):
        arguments = [str(checkpoint), str(tmp_path / dtype), "--dtype", dtype]
        (peak,) = numbers(LIMITED, 0, "convert", *arguments)
        assert peak - bare[0] < SMALL_LIMIT, f"{dtype}: {(peak - bare[0]) / 1e6:.0f} MB above import torch"


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 4])
def test_tiny(tmp_path: Path, bare: tuple[int, int], tensor: int) -> None:
    config = load_config(REPOSITORY / "configs" / "tiny.yaml")
    check(write_large(tmp_path / "step-000000007", config.model, tensor), tmp_path, bare, LIMIT)
