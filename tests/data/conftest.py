"""The shipped tokenizer, and a remote file system."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mf_train.data.tokenizer import Tokenizer
from tests.data.remote import FlakyFileSystem


@pytest.fixture(scope="session")
def tokenizer(repository: Path) -> Tokenizer:
    """The shipped tokenizer."""
    return Tokenizer(repository / "tokenizer")


@pytest.fixture
def remote() -> Iterator[type[FlakyFileSystem]]:
    """`flaky://`, without files and faults."""
    FlakyFileSystem.reset()
    yield FlakyFileSystem
    FlakyFileSystem.reset()
