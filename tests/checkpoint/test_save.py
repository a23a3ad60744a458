"""Saving by several ranks: what is written, when, and what a failure leaves."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_train.checkpoint.fence import Fence, claim
from mf_train.checkpoint.layout import KINDS, list_checkpoints, read_manifest
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.save import Extras, Saver, surplus
from mf_train.checkpoint.verify import find_damage
from mf_train.config import CheckpointConfig, Config, ParallelConfig, TrainingConfig
from mf_train.errors import PeerError, TrainingError
from mf_train.model import MemoryFormer
from mf_train.model.initialise import initialise
from mf_train.parallel.agreement import run_on_first
from mf_train.parallel.engine import Engine
from mf_train.parallel.groups import start_processes, stop_processes
from mf_train.parallel.processes import find_process
from tests.distributed import run_distributed
from tests.parallel.worlds import MODEL, batch_of, make_groups
from tests.standalone.checkpoints import flip

CPU = torch.device("cpu")
EXTRAS = Extras(
    {"step": 1, "tokens": 2},
    "model: {}\n",
    {"tokenizer.model": b"tokenizer"},
    {"tokens": torch.arange(3), "logits": torch.ones(3, 4)},
)


def test_what_is_kept() -> None:
    folder = [Path(f"step-{step:09d}") for step in (100, 200, 300, 400, 500)]

    def deleted(keep: int, keep_every: int) -> list[int]:
        return [int(path.name[5:]) for path in surplus(folder, keep, keep_every)]

    assert deleted(0, 0) == [] and deleted(0, 200) == []
    assert deleted(2, 0) == [100, 200, 300]
    assert deleted(1, 200) == [100, 300]
    assert deleted(9, 0) == []


# in two processes, P = 1 and R = 2


def start_engine(stage: int) -> Engine:
    config = Config(
        model=MODEL,
        parallel=ParallelConfig(zero_stage=stage),
        training=TrainingConfig(global_batch_size=8, micro_batch_size=4),
    )
    groups = make_groups(find_process(), 1)
    model = MemoryFormer(MODEL)
    initialise(model, 0)
    return Engine(model, config, groups, CPU)


def train(engine: Engine, step: int) -> None:
    rows = batch_of(step).chunk(2)[engine.groups.degrees.data_rank]
    engine.backward(rows[:, :-1], rows[:, 1:], share=1.0, last=True)
    engine.update(1e-2)


def saver_in(folder: Path, engine: Engine, **settings: Any) -> Saver:
    token = run_on_first(lambda: claim(folder).token, CPU)
    return Saver(engine, Fence(folder, token), CheckpointConfig(**settings))


def begin(saver: Saver, step: int, wait: bool = False) -> None:
    saver.start(step, EXTRAS if saver.engine.groups.degrees.rank == 0 else None, wait=wait)


def strike(saver: Saver, act: Callable[[], object]) -> None:
    """Save step 1, and have rank 0 do something when all ranks have written and none has completed."""
    begin(saver, 1)
    assert saver._task is not None
    saver._task.wait(60)
    torch.distributed.barrier()
    if saver.engine.groups.degrees.rank == 0:
        act()
    torch.distributed.barrier()


def held(engine: Engine) -> dict[tuple[str, str], tuple[int, torch.Tensor]]:
    """This rank's fragments, copied: where each begins in its parameter, and its values."""
    return {
        (name, kind): (fragment.start, fragment.held(kind).read().clone())
        for name, fragment in engine.fragments().items()
        for kind in KINDS
    }


def overwrite(engine: Engine) -> None:
    """Lose all that the engine holds: what a save still reads of it is not what it was."""
    for fragment in engine.fragments().values():
        for kind in KINDS:
            kept = fragment.held(kind)
            kept.write(torch.zeros_like(kept.read()))


def unwritten_pages(path: Path) -> int:
    """Pages of a file that are in memory and not on its disk yet: cachestat(2). 0 also before Linux 6.5."""
    whole, counts = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
    with path.open() as file:
        ctypes.CDLL(None).syscall(ctypes.c_long(451), file.fileno(), whole, counts, 0)
    _, dirty, being_written, *_ = counts
    return dirty + being_written


def error_of(action: Any) -> str:
    try:
        action()
    except (TrainingError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def cases(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    start_processes(find_process(), CPU, 60)
    found: dict[str, Any] = {}
    for stage in (0, 3):
        engine = start_engine(stage)
        train(engine, 1)
        saver = saver_in(folder / f"stage-{stage}", engine)
        before = held(engine)
        begin(saver, 1)
        overwrite(engine)  # at once: the first file is not even open
        train(engine, 2)
        found[f"early-{stage}"] = [path.name for path in list_checkpoints(saver.fence.folder)]
        deadline = time.monotonic() + 60
        while saver.last is None and time.monotonic() < deadline:
            saver.advance()
        found[f"stage-{stage}"] = (saver.last, before)
        found[f"metrics-{stage}"] = (saver.seconds, saver.take_metrics(), saver.take_metrics())
    engine_saver = functools.partial(saver_in, engine=engine)

    saver = engine_saver(folder / "flipped")
    strike(saver, lambda: flip(next(saver.partial.glob("exp_avg-*"))))
    saver.finish()
    saver = engine_saver(folder / "cut")
    strike(saver, lambda: os.truncate(next(saver.partial.glob("exp_avg-*")), 100))
    found["cut"] = error_of(saver.finish)
    saver = engine_saver(folder / "fenced")
    strike(saver, lambda: claim(saver.fence.folder))
    found["fenced"] = error_of(saver.finish)
    found["fenced again"] = error_of(lambda: begin(saver, 2))
    saver = engine_saver(folder / "rotated", keep=1, keep_every=4)
    for step in range(2, 8):
        begin(saver, step, wait=True)
        assert saver.step == step and saver.last == saver.fence.folder / f"step-{step:09d}"
        if rank == 0:
            files = [*saver.last.iterdir(), saver.fence.folder / "latest"]
            found[f"unwritten-{step}"] = {file.name: unwritten_pages(file) for file in files}
    found["uncopied"] = (saver.last, held(engine), saver.buffers)
    saver = engine_saver(folder / "gone")
    strike(saver, lambda: shutil.rmtree(saver.fence.folder))
    found["gone"] = error_of(saver.finish)
    stop_processes()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saves")
    return folder, run_distributed(cases, 2, folder)


pytestmark = pytest.mark.distributed
Results = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_is_the_state_when_saving_began(results: Results, stage: int) -> None:
    _, ranks = results
    for found in ranks:
        path, before = found[f"stage-{stage}"]
        assert found[f"early-{stage}"] == []
        seconds, metrics, later = found[f"metrics-{stage}"]
        assert metrics.keys() == {"checkpoint_stall_seconds", "checkpoint_seconds"} and not later
        assert 0 < metrics["checkpoint_stall_seconds"] < metrics["checkpoint_seconds"] == seconds
        reader = CheckpointReader(path)
        assert reader.manifest.step == 1
        for (name, kind), (start, values) in before.items():
            assert torch.equal(reader.read_fragment(name, kind, 0, 1, start, values.numel()), values), (
                name,
                kind,
            )
            assert values.any()


def test_without_a_copy_it_is_the_state_too(results: Results) -> None:
    for found in results[1]:
        path, state, buffers = found["uncopied"]
        reader = CheckpointReader(path)
        assert not buffers
        for (name, kind), (start, values) in state.items():
            assert torch.equal(reader.read_fragment(name, kind, 0, 1, start, values.numel()), values), (
                name,
                kind,
            )


def test_a_complete_checkpoint_is_on_disk(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10_000))
    if not unwritten_pages(tmp_path / "file"):
        pytest.skip("this kernel or file system does not tell what is on disk")
    for step in range(2, 8):
        assert results[1][0][f"unwritten-{step}"] == dict.fromkeys(
            [*(file.name for file in results[1][0]["uncopied"][0].iterdir()), "latest"], 0
        )


def test_the_manifest_is_of_the_files(results: Results) -> None:
    path = results[1][0]["stage-3"][0]
    records = read_manifest(path).files
    contents = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    assert records.keys() == contents.keys() and len(contents) == 7
    for name, data in contents.items():
        assert (records[name].size, records[name].crc32) == (len(data), zlib.crc32(data)), name
    assert (path.parent / "latest").read_text() == "step-000000001\n"


def test_a_bit_that_flips_on_the_way_to_the_disk_is_found_by_verify(results: Results) -> None:
    """The checksums are those of the memory that was written from."""
    (path,) = list_checkpoints(results[0] / "flipped")
    (problem,) = find_damage(path)
    assert problem.startswith(f"{path}/exp_avg-0-of-1-part-000.safetensors: its checksum is ")


def test_a_file_that_was_cut_while_others_wrote(results: Results) -> None:
    folder, (first, second) = results
    assert "exp_avg-0-of-1-part-000.safetensors has 100 bytes instead of" in first["cut"]
    assert first["cut"].startswith("TrainingError") and second["cut"].startswith("PeerError")
    assert [path.name for path in (folder / "cut").iterdir()] == [".writer"]


def test_an_older_start_cannot_save(results: Results) -> None:
    folder, (first, second) = results
    for key in ("fenced", "fenced again"):
        assert first[key].startswith("TrainingError") and "a newer start of this run" in first[key]
        assert second[key].startswith("PeerError")
    assert [path.name for path in (folder / "fenced").iterdir()] == [".writer"]


def test_rotation(results: Results) -> None:
    assert [path.name[-1] for path in list_checkpoints(results[0] / "rotated")] == ["4", "7"]
    assert not [
        path for path in (results[0] / "rotated").iterdir() if path.name.startswith((".removed", ".step"))
    ]


def test_a_folder_that_is_gone(results: Results) -> None:
    first, second = (found["gone"] for found in results[1])
    assert first.startswith("TrainingError") and "is not this run's any more" in first
    assert second.startswith("PeerError")
