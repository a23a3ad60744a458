"""What is written against the safetensors library, what is read against torch's own slicing, and damaged files."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mf_train.checkpoint import safetensors_file
from mf_train.checkpoint.safetensors_file import FileLayout, TensorFile, file_bytes
from mf_train.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.int64]


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
    path.write_bytes(file_bytes(tensors, {"format": "pt"}))
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("length", range(1, 130, 16))
def test_data_begin_at_a_cache_line(length: int, tmp_path: Path) -> None:
    name, value = "x" * length, torch.arange(7)
    data = file_bytes({name: value})
    (tmp_path / "x").write_bytes(data)
    begin = 8 + int.from_bytes(data[:8], "little")
    assert begin % 64 == 0 and data[8:9] == b"{" and data[8:begin].rstrip(b" ").endswith(b"}")
    assert data[begin:] == value.numpy().tobytes()
    assert torch.equal(load_file(tmp_path / "x")[name], value)


def test_the_layout_says_where_each_tensor_lies(tmp_path: Path) -> None:
    """Written piece by piece at the offsets, in any order, the file is one that the library reads."""
    tensors = {
        "b.tables": torch.randn(3, 5, 7),
        "empty": torch.zeros(0, 4),
        "a": torch.randn(11).bfloat16(),
        "codes": torch.arange(9).to(torch.uint8),
        "scalar": torch.tensor(5),
    }
    layout = FileLayout({n: (t.dtype, t.shape) for n, t in tensors.items()}, {"format": "pt"})
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


def random_tensor(generator: random.Random, dtype: torch.dtype) -> torch.Tensor:
    shape = [generator.randrange(1, 9) for _ in range(generator.randrange(1, 5))]
    return torch.randint(-100, 100, shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("slab", "long_run"), [(64 << 20, 64 << 10), (64, 64 << 10), (64 << 20, 32), (1, 1)])
def test_any_region(
    tmp_path: Path, dtype: torch.dtype, slab: int, long_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "SLAB_BYTES", slab)
    monkeypatch.setattr(safetensors_file, "_LONG_RUN", long_run)
    monkeypatch.setattr(safetensors_file, "_LARGEST_READ", 24)  # most reads take several calls
    generator = random.Random(slab + long_run)
    tensors = {f"t{i}": random_tensor(generator, dtype) for i in range(8)} | {
        "scalar": torch.ones((), dtype=dtype)
    }
    save_file(tensors, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    assert file.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert file.tensors[name][:2] == (dtype, tuple(tensor.shape))
        assert torch.equal(file.read(name), tensor)
        for _ in range(20):
            starts = [generator.randrange(size) for size in tensor.shape]
            region = tuple(
                slice(a, generator.randrange(a, size + 1))
                for a, size in zip(starts, tensor.shape, strict=True)
            )
            expected = tensor[region]
            assert torch.equal(file.read(name, region), expected), (name, region)
            # into a part of a larger tensor, whose other elements stay
            target = torch.full([size + 2 for size in expected.shape], 77).to(dtype)
            inside = tuple(slice(1, size + 1) for size in expected.shape)
            file.read(name, region, target[inside])
            assert torch.equal(target[inside], expected)
            target[inside] = 77
            assert (target == 77).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "tables": torch.randint(-100, 100, (5, 16, 6)).to(dtype),
        "flat": torch.randint(-100, 100, (9,)).to(dtype),
    }
    save_file(tensors, tmp_path / "x")
    file = TensorFile(tmp_path / "x")
    for name, tensor in tensors.items():
        seen = tensor.view(-1, tensor.shape[-1])
        assert file.rows(name, torch.tensor([], dtype=torch.int64)).shape == (0, tensor.shape[-1])
        for count in (1, 3, 40, 300):
            indices = torch.randint(len(seen), (count,), generator=generator)
            assert torch.equal(file.rows(name, indices), seen[indices])
        everything = torch.arange(len(seen))
        assert torch.equal(file.rows(name, everything), seen)
        assert torch.equal(file.rows(name, everything.flip(0)), seen.flip(0))


def test_memory_is_bounded_by_the_result_and_a_slab(tmp_path: Path) -> None:
    layout = FileLayout({"tables": (torch.float32, (128, 1024, 2048))})  # 1 GiB, of holes
    (tmp_path / "x").write_bytes(layout.header)
    os.truncate(tmp_path / "x", layout.size)
    code = """
import sys, torch
from pathlib import Path
from mf_train.checkpoint.safetensors_file import SLAB_BYTES, TensorFile
peak = lambda: 1024 * int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
file = TensorFile(Path(sys.argv[1]))
file.read("tables", (slice(0, 1),) * 3)
before = peak()
column = file.read("tables", (slice(0, 128), slice(0, 1024), slice(7, 8)))
assert column.shape == (128, 1024, 1) and not column.any()
print((peak() - before) / SLAB_BYTES)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 1.2


def raw(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: Any = (4,), dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


BROKEN = {
    "empty": b"",
    "short": b"\0\0\0",
    "length beyond the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "huge length": b"\xff" * 4000,
    "zip": b"PK\x03\x04" + bytes(4000),
    "not an object": raw([1, 2]),
    "not JSON": raw(b"{'a': 1}"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "deep": raw(b'{"a":' * 20000),
    "a name twice": raw(b'{"a": {}, "a": {}}'),
    "no dtype": raw({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"),
    "unknown dtype": raw({"a": entry(0, 4, dtype="F5")}, b"1234"),
    "a list for a dtype": raw({"a": entry(0, 4, dtype=["U8"])}, b"1234"),
    "no entry": raw({"a": 7}),
    "three offsets": raw({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 8]}}, b"1234"),
    "negative offset": raw({"a": entry(-4, 0)}, b"1234"),
    "negative sizes": raw({"a": entry(0, 4, shape=[-2, -2])}, b"1234"),
    "fractional size": raw({"a": entry(0, 4, shape=[4.0])}, b"1234"),
    "true for a size": raw({"a": entry(0, 1, shape=[True])}, b"1"),
    "text for a shape": raw({"a": entry(0, 4, shape="4")}, b"1234"),
    "shape larger than its data": raw({"a": entry(0, 4, shape=[5])}, b"1234"),
    "an end before its data's": raw({"a": entry(0, 3)}, b"1234"),
    "sizes whose product is enormous": raw({"a": entry(0, 4, shape=[2**62, 4])}, b"1234"),
    "data missing": raw({"a": entry(0, 4)}, b"123"),
    "data left over": raw({"a": entry(0, 4)}, b"12345"),
    "beyond the file": raw({"a": entry(4, 8)}, b"1234"),
    "overlap": raw({"a": entry(0, 4), "b": entry(2, 6)}, b"123456"),
    "the same twice": raw({"a": entry(0, 4), "b": entry(0, 4)}, b"12345678"),
    "a gap": raw({"a": entry(0, 4), "b": entry(6, 10)}, b"1234567890"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_not_right_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "victim.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(UserError, match=r"victim\.safetensors: damaged.*; use another") as caught:
        TensorFile(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_every_way_to_cut_a_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5), "b": torch.ones(3)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for size in range(len(data)):
        (tmp_path / "x").write_bytes(data[:size])
        with pytest.raises(UserError, match="damaged"):
            TensorFile(tmp_path / "x")


def test_flipped_header_bits_are_refused_or_change_nothing_of_the_data(tmp_path: Path) -> None:
    """A flip may rename a tensor or change its dtype for one of the same size; nothing else is let through."""
    save_file({"a": torch.arange(5), "b": torch.ones(3)}, tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    length = int.from_bytes(data[:8], "little")
    accepted = 0
    for bit in range(8 * (8 + length)):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "x").write_bytes(data)
        try:
            with TensorFile(tmp_path / "x") as file:
                found = list(file.tensors.values())
                assert sorted((t.dtype.itemsize, t.offset) for t in found) == [
                    (4, 8 + length + 40),
                    (8, 8 + length),
                ]
                accepted += 1
        except UserError:
            pass
        data[bit // 8] ^= 1 << bit % 8
    assert 0 < accepted < 200  # spaces at the header's end to tabs, names


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.safetensors", tmp_path / "executed"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Malicious(mark))),
        lambda: torch.save(Malicious(mark), path),
        lambda: torch.save(Malicious(mark), path, _use_new_zipfile_serialization=False),
    ):
        write()
        with pytest.raises(UserError, match="not a safetensors file"):
            TensorFile(path)
        assert not mark.exists()
    torch.load(path.rename(tmp_path / "x.pt"), weights_only=False)  # it would have been executed
    assert mark.exists()


def test_a_file_that_shrinks_while_open_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.arange(100_000)}, tmp_path / "x")
    file = TensorFile(tmp_path / "x", "copy it again")
    os.truncate(tmp_path / "x", 1000)
    with pytest.raises(UserError, match=r"x: damaged \(it ends at byte 1000 and was longer.*; copy it again"):
        file.read("a")
    with pytest.raises(UserError, match="x: damaged"):
        file.rows("a", torch.tensor([0]))


def test_what_the_machine_does_is_an_oserror_with_the_files_name(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        TensorFile(tmp_path)
    path = tmp_path / "x"
    save_file({"a": torch.arange(10)}, path)
    with TensorFile(path) as file:
        folder = os.open(tmp_path, os.O_RDONLY)
        os.dup2(folder, file._file.fileno())  # reading fails from now on
        os.close(folder)
        with pytest.raises(OSError, match="x'"):
            file.read("a")
