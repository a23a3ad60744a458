"""Reading regions and fragments from checkpoints written by any number of tensor-parallel ranks."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mf_train.checkpoint import safetensors_file
from mf_train.checkpoint.layout import (
    FORMAT,
    KINDS,
    MANIFEST,
    STATE,
    DamageError,
    FileRecord,
    Manifest,
    part_name,
    resolve_checkpoint,
)
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import FileLayout
from mf_train.errors import UserError
from mf_train.model.sharding import slice_of_rank
from tests.standalone.checkpoints import write_slices

SHAPES = {
    "embedding.weight": (24, 16),
    "blocks.0.query.tables": (4, 8, 16),
    "blocks.0.query.bias": (16,),
    "head.weight": (24, 16),
}


Values = dict[str, dict[str, torch.Tensor]]
PART_BYTES = 1000  # so small that there are several parts


def write_checkpoint(folder: Path, tensor: int, values: Values) -> Path:
    """A checkpoint folder of tensors alone, in several parts, as `tensor` ranks would write it."""
    folder.mkdir()
    write_slices(folder, values, tensor, step=3, part_bytes=PART_BYTES)
    return folder


@pytest.fixture
def values() -> Values:
    return {kind: {name: torch.randn(shape) for name, shape in SHAPES.items()} for kind in KINDS}


@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("read", [1, 2, 8])
def test_any_fragment_of_any_degree(tmp_path: Path, values: Values, written: int, read: int) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", written, values))
    generator = random.Random(written * 10 + read)
    for kind, name in itertools.product(KINDS, SHAPES):
        whole = values[kind][name]
        assert torch.equal(reader.read(name, kind), whole)
        for rank in range(read):
            local = slice_of_rank(whole, name, rank, read).reshape(-1)
            for _ in range(5):
                start = generator.randrange(local.numel())
                numel = generator.randrange(1, local.numel() - start + 1)
                got = reader.read_fragment(name, kind, rank, read, start, numel)
                assert torch.equal(got, local[start : start + numel]), (name, kind, rank, start, numel)


def test_a_region(tmp_path: Path, values: Values) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", 4, values))
    region = (slice(1, 3), slice(0, 8), slice(3, 14))  # crosses all four ranks' columns
    expected = values["exp_avg"]["blocks.0.query.tables"][region]
    assert torch.equal(reader.read("blocks.0.query.tables", "exp_avg", region), expected)


def test_a_reader_that_is_closed_keeps_no_space_of_what_is_deleted(tmp_path: Path, values: Values) -> None:
    """A run goes on for days after it has read the checkpoint that it resumed from."""
    reader = CheckpointReader(write_checkpoint(tmp_path / "step-000000005", 2, values))
    before = {name: reader.read(name) for name in reader.shapes}

    def open_files() -> list[str]:
        found = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
        return [path for path in found if path.startswith(str(tmp_path))]

    assert open_files()
    reader.close()
    assert not open_files()
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in before.items())


def test_damage_is_named(tmp_path: Path, values: Values) -> None:
    folder = write_checkpoint(tmp_path / "c", 2, values)
    victim = folder / part_name("exp_avg", 1, 2, 0)
    data = victim.read_bytes()
    victim.write_bytes(data[:-1])
    with pytest.raises(
        UserError, match=rf"{victim.name}: damaged .{len(data) - 1} bytes instead of {len(data)}"
    ):
        CheckpointReader(folder)
    victim.unlink()
    with pytest.raises(UserError, match=f"{victim.name}: missing"):
        CheckpointReader(folder)
    victim.write_bytes(b"\xff" * len(data))  # right size, wrong contents
    reader = CheckpointReader(folder)
    with pytest.raises(UserError, match=f"{victim.name}: damaged"):
        reader.read("embedding.weight", "exp_avg")
    (folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        CheckpointReader(folder)


def test_what_a_path_means(tmp_path: Path, values: Values) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        resolve_checkpoint(run)
    (run / "checkpoints" / ".step-000000009.partial").mkdir()
    for step in (2, 10):
        write_checkpoint(run / "checkpoints" / f"step-{step:09d}", 1, values)
    (run / "checkpoints" / "latest").write_text("step-000000010\n")
    newest = run / "checkpoints" / "step-000000010"
    for path in (run, run / "checkpoints", run / "checkpoints" / "latest", newest):
        assert resolve_checkpoint(path) == newest
    with pytest.raises(UserError, match="no such checkpoint"):
        resolve_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("written", [1, 2, 4])
def test_random_models_regions_and_slices(
    tmp_path: Path, written: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes, parts, regions, fragments and rows at random, with slabs so small that every read takes several."""
    monkeypatch.setattr(safetensors_file, "SLAB_BYTES", 256)
    generator = random.Random(written)
    for case in range(6):
        width = 4 * generator.randrange(1, 5)
        shapes: dict[str, tuple[int, ...]] = {
            "embedding.weight": (generator.randrange(1, 20), width),
            "a.tables": (generator.randrange(1, 5), 1 << generator.randrange(1, 4), width),
            "a.bias": (width,),
            "head.weight": (4 * generator.randrange(1, 6), generator.randrange(1, 9)),
        }
        whole = {name: torch.randn(shape) for name, shape in shapes.items()}
        folder = tmp_path / str(case)
        folder.mkdir()
        write_slices(folder, {"master": whole}, written, part_bytes=generator.choice([1, 300, 10_000]))
        reader = CheckpointReader(folder)
        for name, value in whole.items():
            for _ in range(8):
                starts = [generator.randrange(size) for size in value.shape]
                region = tuple(
                    slice(a, generator.randrange(a, size + 1))
                    for a, size in zip(starts, value.shape, strict=True)
                )
                assert torch.equal(reader.read(name, region=region), value[region]), (name, region)
                tensor = generator.choice([1, 2, 4])
                rank = generator.randrange(tensor)
                local = slice_of_rank(value, name, rank, tensor).reshape(-1)
                start = generator.randrange(local.numel() + 1)
                numel = generator.randrange(local.numel() - start + 1)
                got = reader.read_fragment(name, "master", rank, tensor, start, numel)
                assert torch.equal(got, local[start : start + numel])
                seen = value.view(-1, value.shape[-1])
                indices = torch.tensor(
                    [generator.randrange(len(seen)) for _ in range(generator.randrange(9))], dtype=torch.int64
                )
                assert torch.equal(reader.rows(name, indices), seen[indices]), (name, indices)


def test_moments_that_are_not_there_are_zero(tmp_path: Path, values: Values) -> None:
    (tmp_path / "c").mkdir()
    write_slices(tmp_path / "c", {"master": values["master"]}, 2)
    reader = CheckpointReader(tmp_path / "c")
    for kind in ("exp_avg", "exp_avg_sq"):
        moment = reader.read("head.weight", kind)
        assert moment.shape == (24, 16) and moment.dtype == torch.float32 and not moment.any()
        assert not reader.read_fragment("blocks.0.query.tables", kind, 1, 4, 7, 50).any()
    assert torch.equal(reader.read("head.weight"), values["master"]["head.weight"])


def test_a_fragment_needs_little_beside_itself(tmp_path: Path) -> None:
    """Across both halves of tables whose rows of the first dimension are large, in a file of holes."""
    layout = FileLayout({"a.tables": (torch.float32, (64, 1024, 2048))})  # half a gigabyte
    name = part_name("master", 0, 1, 0)
    (tmp_path / name).write_bytes(layout.header)
    os.truncate(tmp_path / name, layout.size)
    files = {name: FileRecord(layout.size, 0)}
    shapes = {"a.tables": (64, 1024, 2048)}
    (tmp_path / MANIFEST).write_text(
        Manifest(FORMAT, 1, 1, ("master",), shapes, {"a.tables": 0}, files).to_json()
    )
    code = """
import sys
from pathlib import Path
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import FileLayout
peak = lambda: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
reader = CheckpointReader(Path(sys.argv[1]))
reader.read_fragment("a.tables", "master", 1, 2, 5, 7)
before = peak()
result = reader.read_fragment("a.tables", "master", 1, 2, 5, 2**25)
print((peak() - before - result.nbytes) / 2**20)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 80


def test_small_files_are_read_with_their_checksum(tmp_path: Path, values: Values) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / STATE).write_text('{"step": 3}')
    write_slices(folder, values, 1)
    assert CheckpointReader(folder).state() == {"step": 3}
    for text, problem in (('{"step": 4}', "its checksum differs"), ('{"step": 33}', "bytes instead of")):
        (folder / STATE).write_text(text)
        with pytest.raises(DamageError, match=rf"{STATE}: damaged \(.*{problem}"):
            CheckpointReader(folder).state()
        with pytest.raises(DamageError, match=rf"{STATE}: damaged"):
            CheckpointReader(folder, check_sizes=False).state()
    (folder / STATE).unlink()
    with pytest.raises(DamageError, match=f"{STATE}: missing"):
        CheckpointReader(folder, check_sizes=False).state()
    with pytest.raises(DamageError, match=r"x: not in manifest\.json"):
        CheckpointReader(folder, check_sizes=False).read_file("x")


def test_a_part_that_holds_something_else_is_damaged(tmp_path: Path, values: Values) -> None:
    folder = write_checkpoint(tmp_path / "c", 2, values)
    one, other = (folder / part_name("master", 0, 2, part) for part in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(DamageError, match=rf"{one.name}: damaged \(embedding\.weight is missing"):
        CheckpointReader(folder, check_sizes=False).read("embedding.weight")
