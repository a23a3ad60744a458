"""The shipped tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_train.data.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(repository: Path) -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer(repository / "tokenizer")
