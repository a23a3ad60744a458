"""What several workers of pytest-xdist use and one makes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """`make(folder)` in a folder called `name`, by the first worker that asks; the others get what it returned."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # each worker has a folder of its own in it
    result = base / f"{name}.pickle"
    with FileLock(base / f"{name}.lock"):
        if not result.exists():
            (base / name).mkdir()
            result.write_bytes(pickle.dumps(make(base / name)))
        value: T = pickle.loads(result.read_bytes())
    return value
