"""TensorFileWriter against the safetensors library."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mf_train.checkpoint.tensor_file import TensorFileWriter


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
