"""Real training runs, trained once for all tests of this folder, and what they convert to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mf_train.checkpoint.layout import resolve_checkpoint
from mf_train.standalone.conversion.convert import convert
from tests.shared import made_once
from tests.threads import threads
from tests.training.runs import small_config, train, write_text

VALIDATED_SEQUENCES = 5


@dataclass(frozen=True)
class Trained:
    """A run's folder, its last checkpoint, the text that it validated on, and its converted model."""

    run: Path
    checkpoint: Path
    text: Path
    model: Path
    said: list[str]  # by `convert`


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As the runs have: these models are so small that a second thread only waits."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def float32_two(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained in float32 by two processes, tables split over both."""
    return _trained(tmp_path_factory, "float32-two", 2, "float32")


@pytest.fixture(scope="session")
def float32_one(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The same run in one process."""
    return _trained(tmp_path_factory, "float32-one", 1, "float32")


@pytest.fixture(scope="session")
def bfloat16_two(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Trained in bfloat16 by two processes, tables split over both, with the model's regularisers."""
    regularisers = ("model.qk_norm=true", "model.logit_softcap=5", "training.z_loss=1e-4")
    return _trained(tmp_path_factory, "bfloat16-two", 2, "bfloat16", *regularisers)


@pytest.fixture(scope="session")
def documents_two(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """As `float32_two`, with attention inside documents."""
    return _trained(tmp_path_factory, "documents-two", 2, "float32", "data.document_attention=true")


def _trained(
    tmp_path_factory: pytest.TempPathFactory, name: str, processes: int, precision: str, *overrides: str
) -> Trained:
    return made_once(tmp_path_factory, name, lambda folder: _train(folder, processes, precision, *overrides))


def _train(folder: Path, processes: int, precision: str, *overrides: str) -> Trained:
    text = write_text(folder / "text.jsonl")
    tree = small_config(folder / "run", text)
    tree["model"]["vocab_size"] = 4160  # more than the tokenizer has
    tree["training"] |= {"steps": 3, "precision": precision, "validation_interval": 3}
    train(tree, f"parallel.tensor={processes}", *overrides, processes=processes)
    checkpoint = resolve_checkpoint(folder / "run")
    said = list(convert(checkpoint, folder / "model"))
    return Trained(folder / "run", checkpoint, text, folder / "model", said)
