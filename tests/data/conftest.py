"""A cache of documents and a small tokenizer of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from mf_train.data.tokenizer import Tokenizer


@pytest.fixture(scope="session", autouse=True)
def document_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing is read from or left in the user's cache; subprocesses get it through HF_HOME."""
    home = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(home))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
        yield home


@pytest.fixture(scope="session")
def tokenizer(repository: Path) -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer(repository / "tokenizer")
