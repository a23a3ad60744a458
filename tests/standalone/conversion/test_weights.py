"""copy_weights against torch's own conversion, with damage in its source and trouble at its destination."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import ModelConfig
from mf_train.errors import UserError
from mf_train.model.quantized import quantize_rows, scales_name
from mf_train.standalone.conversion import weights as module
from mf_train.standalone.conversion.weights import copy_weights
from tests.processes import run_python
from tests.standalone.checkpoints import random_weights, write_slices

SMALL = ModelConfig(hidden_size=32, num_layers=1, num_heads=4, bits=4, vocab_size=512, sequence_length=32)
DTYPES = [torch.float32, torch.bfloat16, torch.int8]


@pytest.fixture(scope="module")
def values() -> dict[str, Tensor]:
    return random_weights(SMALL, 3)


def write(folder: Path, values: dict[str, Tensor], tensor: int) -> CheckpointReader:
    folder.mkdir()
    write_slices(folder, {"master": values}, tensor, part_bytes=30_000)
    assert len(list(folder.glob("weights-0-of-*"))) > 2
    return CheckpointReader(folder)


def expected_tensors(values: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    expected = {}
    for name, value in values.items():
        if dtype == torch.int8 and (scales := scales_name(name)):
            expected[f"model.{name}"], expected[f"model.{scales}"] = quantize_rows(value)
        else:
            expected[f"model.{name}"] = value.to(torch.bfloat16 if dtype == torch.int8 else dtype)
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tensor", "slice_bytes"), [(1, 4 << 20), (1, 500), (2, 3000), (4, 1000)])
def test_every_tensor_and_its_hash(
    tmp_path: Path,
    values: dict[str, Tensor],
    dtype: torch.dtype,
    tensor: int,
    slice_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", slice_bytes)
    reader = write(tmp_path / "c", values, tensor)
    for shard_bytes in (module.SHARD_BYTES, 50_000):
        folder = tmp_path / f"m{shard_bytes}"
        folder.mkdir()
        digests = copy_weights(reader, folder, dtype, shard_bytes)
        stored: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            stored |= load_file(path)
        expected = expected_tensors(values, dtype)
        assert stored.keys() == expected.keys() and list(digests) == list(expected)
        for name, tensor_ in expected.items():
            assert stored[name].dtype == tensor_.dtype and torch.equal(stored[name], tensor_), name
            data = tensor_.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            assert digests[name] == hashlib.sha256(data).hexdigest(), name


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_flipped_bit_anywhere_in_the_source_is_found(
    tmp_path: Path, values: dict[str, Tensor], dtype: torch.dtype, tensor: int
) -> None:
    reader = write(tmp_path / "c", values, tensor)
    generator = random.Random(tensor)
    for number, victim in enumerate(sorted(reader.checkpoint.glob("weights-*"))):
        data = bytearray(victim.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        # the last byte, one of the data, and one of the header's spaces, which changes nothing that is read
        assert data[begin - 1] == ord(" ")
        for place, bit in ((len(data) - 1, 7), (generator.randrange(begin, len(data)), 0), (begin - 1, 0)):
            data[place] ^= 1 << bit if place != begin - 1 else ord(" ") ^ ord("\t")
            victim.write_bytes(data)
            folder = tmp_path / f"m{number}-{place}"
            folder.mkdir()
            with pytest.raises(UserError, match=f"{victim.name}: damaged .its checksum differs"):
                copy_weights(CheckpointReader(reader.checkpoint), folder, dtype)
            data[place] ^= 1 << bit if place != begin - 1 else ord(" ") ^ ord("\t")
        victim.write_bytes(data)


def test_a_source_that_ends_early(tmp_path: Path, values: dict[str, Tensor]) -> None:
    reader = write(tmp_path / "c", values, 1)
    victim = sorted(reader.checkpoint.glob("weights-*"))[-1]
    reader.read(
        next(
            name
            for name, part in reader.manifest.parts.items()
            if part == max(reader.manifest.parts.values())
        )
    )
    with victim.open("r+b") as file:
        file.truncate(victim.stat().st_size - 4)
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match=rf"{victim.name}: damaged \(it ends at byte"):
        copy_weights(reader, tmp_path / "m", torch.float32)


def test_a_full_disk_is_an_oserror_with_the_files_name(tmp_path: Path, values: dict[str, Tensor]) -> None:
    """RLIMIT_FSIZE makes writing beyond a size fail, as a quota does."""
    write(tmp_path / "c", values, 2)
    (tmp_path / "m").mkdir()
    code = """
import resource, sys, torch
from pathlib import Path
from mf_train.checkpoint.read import CheckpointReader
from mf_train.standalone.conversion.weights import copy_weights
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    copy_weights(CheckpointReader(Path(sys.argv[1])), Path(sys.argv[2]), torch.float32)
except OSError as error:
    print(type(error).__name__, error.errno, error.filename)
"""
    assert run_python(code, tmp_path / "c", tmp_path / "m").split() == [
        "OSError",
        "27",
        str(tmp_path / "m" / "model.safetensors"),
    ]
