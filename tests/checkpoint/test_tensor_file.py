"""TensorFileWriter against the safetensors library."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mf_train.checkpoint.tensor_file import Layout, TensorFileWriter
from mf_train.checkpoint.tensor_reader import TensorFile


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a.tables": torch.randn(3, 5, 7, generator=generator),
        "b": torch.randn(11, generator=generator).bfloat16(),
        "empty": torch.zeros(0, 4),
        "codes": torch.randint(256, (2, 9), generator=generator).to(torch.uint8),
        "int8": torch.randint(-128, 128, (3, 5), generator=generator).to(torch.int8),
        "ids": torch.randint(2**40, (5,), generator=generator),
    }
    path = tmp_path / "x.safetensors"
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with TensorFileWriter(path, layout, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            if tensor.dim() == 3:
                for row in tensor:  # by parts
                    writer.append(row)
            else:
                writer.write(name, tensor)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", range(1, 130, 16))
def test_data_begin_at_a_cache_line(length: int, tmp_path: Path) -> None:
    name, value = "x" * length, torch.arange(7)
    with TensorFileWriter(tmp_path / "x", {name: (value.dtype, value.shape)}) as writer:
        writer.write(name, value)
    data = (tmp_path / "x").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 64 == 0 and data[8:9] == b"{" and data[8:begin].rstrip(b" ").endswith(b"}")
    assert data[begin:] == value.numpy().tobytes()
    assert torch.equal(load_file(tmp_path / "x")[name], value)


def test_a_file_that_lacks_data_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="wrote"),
        TensorFileWriter(tmp_path / "x", {"a": (torch.float32, (4,))}) as writer,
    ):
        writer.append(torch.zeros(3))


def test_the_layout_says_where_each_tensor_lies(tmp_path: Path) -> None:
    """Written piece by piece at the offsets, in any order, the file is one that the library reads."""
    tensors = {
        "b.tables": torch.randn(3, 5, 7),
        "empty": torch.zeros(0, 4),
        "a": torch.randn(11).bfloat16(),
        "codes": torch.arange(9).to(torch.uint8),
        "scalar": torch.tensor(5),
    }
    layout = Layout({n: (t.dtype, t.shape) for n, t in tensors.items()}, {"format": "pt"})
    file = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    for name in reversed(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
        os.pwrite(file, data, layout.offsets[name])
    os.pwrite(file, layout.header, 0)
    os.close(file)
    assert (tmp_path / "x").stat().st_size == layout.size
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with TensorFile(tmp_path / "x") as file:
        assert {n: t.offset for n, t in file.tensors.items()} == layout.offsets
