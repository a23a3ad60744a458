"""Files of a checkpoint that are cut short, have a flipped bit or are missing."""

from __future__ import annotations

import itertools
import random
import re
import shutil
from pathlib import Path

import pytest

from mf_train.checkpoint.verify import verify
from mf_train.errors import TrainingError
from tests.faults.conftest import Drill, MakeRun
from tests.faults.drill import Loss, Run, list_steps, name_of, newest_step

FILES = [
    "manifest.json",
    "state.json",
    "config.yaml",
    "tokenizer.model",
    "probe.safetensors",
    "weights-0-of-1-part-000.safetensors",
    "exp_avg-0-of-1-part-000.safetensors",
    "exp_avg_sq-0-of-1-part-000.safetensors",
]
pytestmark = pytest.mark.faults


def copy_before_the_end(run: Run) -> int:
    """The reference's folder as it was before its last save; returns the newest step that is saved there."""
    assert run.reference is not None
    shutil.copytree(run.reference.folder, run.folder)
    last = newest_step(run.checkpoints)
    shutil.rmtree(run.checkpoints / name_of(last))
    newest = newest_step(run.checkpoints)
    (run.checkpoints / "latest").write_text(f"{name_of(newest)}\n")
    metrics = run.folder / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[: newest + 1]))
    return newest


def damage(file: Path, how: str, generator: random.Random) -> str:
    """Damage a file; says where."""
    content = bytearray(file.read_bytes())
    place = generator.randrange(len(content))
    if how == "missing":
        file.unlink()
    elif how == "cut short":
        file.write_bytes(content[:place])
    else:
        bit = generator.randrange(8)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        return f"{file.name}: bit {bit} of byte {place} of {len(content)}"
    return f"{file.name}: {how} at {place} of {len(content)}"


def drill_damage(run: Run, drill: Drill, name: str, how: str) -> None:
    """Damage a file of the newest checkpoint: it is named, and the one before it is used."""
    newest = copy_before_the_end(run)
    before = list_steps(run.checkpoints)[-2]
    print(damage(run.checkpoints / name_of(newest) / name, how, drill.random))
    with pytest.raises(TrainingError, match=f"1 of 2 checkpoints.*{name_of(newest)}/{re.escape(name)}: "):
        list(verify(run.folder))
    drill.struck(Loss(run.last_step() - before, newest - before - run.interval))
    start = run.start()
    drill.recovered(start.wait_for_step(1))
    assert start.end() == 0, start.text()
    told = [line for line in start.text().splitlines() if name_of(newest) in line and "damaged" in line]
    assert told and any(name in line for line in told), start.text()
    assert f"resumed after step {before} " in start.text()
    assert (run.checkpoints / f"{name_of(newest)}.damaged").is_dir()  # kept to look at
    run.check_end()


@pytest.mark.slow
def test_a_flipped_bit(make_run: MakeRun, drill: Drill) -> None:
    drill.case("a flipped bit, two processes")
    drill_damage(make_run(2, 12), drill, FILES[5], "flipped bit")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "name"),
    [
        *itertools.product(["flipped bit", "cut short"], FILES),
        *itertools.product(["missing"], [FILES[0], FILES[1], FILES[5]]),
    ],
)
def test_a_damaged_file(how: str, name: str, make_run: MakeRun, drill: Drill) -> None:
    drill.case(f"a file of the newest checkpoint: {how}")
    drill_damage(make_run(1, 12), drill, name, how)


@pytest.mark.slow
def test_every_checkpoint_damaged(make_run: MakeRun, drill: Drill) -> None:
    """Nothing is trained from scratch in a folder that held a run: one line says what is damaged."""
    drill.case("all checkpoints damaged")
    run = make_run(1, 12)
    copy_before_the_end(run)
    content = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    broken = [run.checkpoints / name_of(step) / FILES[5] for step in list_steps(run.checkpoints)]
    for file in broken:
        damage(file, "cut short", drill.random)
    metrics = (run.folder / "metrics.jsonl").read_bytes()
    start = run.start()
    assert start.end() in (1, 2), start.text()
    (line,) = start.complaints()
    assert all(file.parent.name in line for file in broken), line
    assert (run.folder / "metrics.jsonl").read_bytes() == metrics
    shutil.rmtree(run.checkpoints)
    for path, saved in content.items():  # mended, as from a backup
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved)
    drill.struck(run.check_folder())
    drill.recovered(run.finish())
