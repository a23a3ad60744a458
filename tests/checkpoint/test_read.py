"""Reading regions and fragments from checkpoints written by any number of tensor-parallel ranks."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from mf_train.checkpoint.layout import FORMAT, KINDS, MANIFEST, Manifest, part_name, resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.tensor_file import TensorFileWriter
from mf_train.errors import UserError
from mf_train.parallel.tensor import slice_of_rank

SHAPES = {
    "embedding.weight": (24, 16),
    "blocks.0.query.tables": (4, 8, 16),
    "blocks.0.query.bias": (16,),
    "head.weight": (24, 16),
}


def write_checkpoint(folder: Path, tensor: int, values: dict[tuple[str, str], torch.Tensor]) -> Path:
    """A checkpoint folder with two parts, as `tensor` ranks would write it."""
    folder.mkdir()
    parts = {name: index % 2 for index, name in enumerate(SHAPES)}
    for kind in KINDS:
        for rank in range(tensor):
            for part in range(2):
                local = {
                    name: slice_of_rank(values[name, kind], name, rank, tensor)
                    for name in SHAPES
                    if parts[name] == part
                }
                layout = {name: (value.dtype, value.shape) for name, value in local.items()}
                with TensorFileWriter(folder / part_name(kind, rank, tensor, part), layout) as writer:
                    for name, value in local.items():
                        writer.write(name, value)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    shapes = {name: list(shape) for name, shape in SHAPES.items()}
    (folder / MANIFEST).write_text(Manifest(FORMAT, 3, tensor, shapes, parts, files).to_json())
    return folder


@pytest.fixture
def values() -> dict[tuple[str, str], torch.Tensor]:
    return {(name, kind): torch.randn(shape) for name, shape in SHAPES.items() for kind in KINDS}


@pytest.mark.parametrize("written", [1, 2, 4])
@pytest.mark.parametrize("read", [1, 2, 8])
def test_any_fragment_of_any_degree(
    tmp_path: Path, values: dict[tuple[str, str], torch.Tensor], written: int, read: int
) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", written, values))
    generator = random.Random(written * 10 + read)
    for (name, kind), whole in values.items():
        assert torch.equal(reader.read(name, kind), whole)
        for rank in range(read):
            local = slice_of_rank(whole, name, rank, read).reshape(-1)
            for _ in range(5):
                start = generator.randrange(local.numel())
                numel = generator.randrange(1, local.numel() - start + 1)
                got = reader.read_fragment(name, kind, rank, read, start, numel)
                assert torch.equal(got, local[start : start + numel]), (name, kind, rank, start, numel)


def test_a_region(tmp_path: Path, values: dict[tuple[str, str], torch.Tensor]) -> None:
    reader = CheckpointReader(write_checkpoint(tmp_path / "c", 4, values))
    region = (slice(1, 3), slice(0, 8), slice(3, 14))  # crosses all four ranks' columns
    expected = values["blocks.0.query.tables", "exp_avg"][region]
    assert torch.equal(reader.read("blocks.0.query.tables", "exp_avg", region), expected)


def test_damage_is_named(tmp_path: Path, values: dict[tuple[str, str], torch.Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "c", 2, values)
    victim = folder / part_name("exp_avg", 1, 2, 0)
    data = victim.read_bytes()
    victim.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"{victim.name}: {len(data) - 1} bytes instead of {len(data)}"):
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


def test_what_a_path_means(tmp_path: Path, values: dict[tuple[str, str], torch.Tensor]) -> None:
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
