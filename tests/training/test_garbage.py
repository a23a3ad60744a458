"""Python's garbage is collected at fixed steps and at no other time, and afterwards as before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.training.garbage import GarbageCollection
from tests.training.runs import REPOSITORY, has_steps, small_config, train, write_text


@pytest.fixture
def collected() -> Iterator[list[int]]:
    """The generation of every collection that begins."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    gc.callbacks.append(note)
    yield generations
    gc.callbacks.remove(note)


def steps_with_collections(interval: int, collected: list[int]) -> list[int]:
    """Of 10 steps that each leave thousands of cycles, those in or after which there was a collection."""
    garbage, found = GarbageCollection(interval), []
    garbage.start()
    try:
        for step in range(1, 11):
            collected.clear()
            for _ in range(5000):
                cycle: list[object] = []
                cycle.append(cycle)
            garbage.after(step)
            if collected:
                found.append(step)
    finally:
        garbage.close()
    return found


def test_all_is_collected_at_these_steps_alone(collected: list[int]) -> None:
    assert steps_with_collections(4, collected) == [4, 8]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_without_an_interval_python_collects_as_ever(collected: list[int]) -> None:
    assert steps_with_collections(0, collected) == [*range(1, 11)]


def test_an_interval_below_0_is_refused() -> None:
    with pytest.raises(UserError, match=r"training\.gc_interval is -1: it must be a number, 0 or more"):
        load_config(REPOSITORY / "configs" / "quickstart.yaml", ["training.gc_interval=-1"])


@pytest.mark.distributed
def test_a_run_takes_the_interval(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["training"] |= {"steps": 6, "gc_interval": 2}
    train(tree)
    assert has_steps(tree, 6)
