"""Safetensors files, written and read in parts, so that their size is not bounded by memory.

Format: https://github.com/huggingface/safetensors, section "Format": eight bytes with the header's length, a JSON
header with each tensor's dtype, shape and offsets, then the data.

Written: the header is padded with spaces so that the data begin at a multiple of 64 bytes, a cache line; tensors follow
without gaps.

Read: nothing in a file is trusted. The header is parsed and checked whole, before any data are read; nothing of a file
is ever executed. Data are read and not mapped: a file that another process shortens is an error and not a SIGBUS, and
what was read does not stay in this process's memory.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from mf_train.errors import UserError

Region = tuple[slice, ...]

ALIGNMENT = 64  # of the data's first byte when a file is written
SLAB_BYTES = 64 << 20  # largest temporary copy of a part of the file
_LARGEST_HEADER = 100_000_000  # the safetensors library's own bound
# Bytes in a row that are worth a read of their own, rather than one read with all between.
_LONG_RUN = 64 << 10
_LARGEST_READ = 1 << 30  # of one system call; Linux ends at 2 GiB - 4 KiB
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class FileLayout:
    """Where each tensor's data lie in a safetensors file of the tensors given (name: (dtype, shape)), in their order.

    `header` is the file's first bytes, `offsets` the place of each tensor's first byte, `size` the file's, in bytes.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[torch.dtype, torch.Size | tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + offset
        self.offsets = {
            name: len(self.header) + header[name]["data_offsets"][0]  # type: ignore[index]
            for name in tensors
        }


class TensorFileWriter:
    """Writes the tensors declared in `layout` (name: (dtype, shape)) into a new safetensors file.

    Each tensor arrives whole (`write`) or by parts of its flat data in order (`append`), in the layout's order.
    Leaving the `with` block without an error syncs the file to disk.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, torch.Size | tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.layout = FileLayout(layout, metadata)
        self.file = open(path, "wb")
        self.file.write(self.layout.header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the layout."""
        dtype, shape = self.layout.tensors[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), (
            name,
            tensor.dtype,
            tensor.shape,
        )
        self.append(tensor)

    def append(self, part: Tensor) -> None:
        """Write the next part of the data, in row-major order."""
        self.file.write(bytes_of(part.detach().contiguous().cpu()))

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                written = self.file.tell()
                size = self.layout.size
                assert written == size, f"{self.path}: wrote {written} of {size} bytes"
        finally:
            self.file.close()


class StoredTensor(NamedTuple):
    """A tensor of a file; `offset` is the place of its first byte, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """An open safetensors file: `tensors` maps each name to its StoredTensor. Threads may read at the same time.

    Raises UserError naming the file, with `remedy` at its end, where it is not a safetensors file or a damaged one;
    OSError naming the file for what the machine does.
    """

    def __init__(self, path: Path, remedy: str = "use another copy of it") -> None:
        self.path = path
        self._remedy = remedy
        self._file = open(path, "rb", buffering=0)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.tensors = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def read(self, name: str, region: Region | None = None, out: Tensor | None = None) -> Tensor:
        """A region (slices with start and stop) of a tensor; the whole by default. On the CPU, in the file's dtype.

        The result is written into `out` where it is given: of the region's shape and the file's dtype, with any
        strides. Needs at most SLAB_BYTES beside the result.
        """
        dtype, shape, offset = self.tensors[name]
        region = region or tuple(slice(0, size) for size in shape)
        assert len(region) == len(shape), (name, shape, region)
        assert all(0 <= s.start <= s.stop <= n for s, n in zip(region, shape, strict=True)), (
            name,
            shape,
            region,
        )
        sizes = tuple(part.stop - part.start for part in region)
        if out is None:
            out = torch.empty(sizes, dtype=dtype)
        assert out.shape == sizes and out.dtype == dtype and out.device.type == "cpu", (name, sizes, out)
        strides = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
        first = sum(part.start * stride for part, stride in zip(region, strides, strict=True))
        self._fill(out, offset + first * dtype.itemsize, strides)
        return out

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows [n, last] of a tensor seen as [-1, last dimension]; `indices` int64 [n], in any order, repeated or not.

        Each row is read once, and neighbours by one read.
        """
        dtype, shape, offset = self.tensors[name]
        width = shape[-1]
        if not indices.numel():
            return torch.empty(0, width, dtype=dtype)
        wanted, places = indices.unique(return_inverse=True)
        assert 0 <= wanted[0] and wanted[-1] < math.prod(shape[:-1]), (name, shape, wanted[0], wanted[-1])
        values = torch.empty(len(wanted), width, dtype=dtype)
        data, row_bytes = bytes_of(values), width * dtype.itemsize
        ends = [*(wanted.diff() != 1).nonzero().flatten().add(1).tolist(), len(wanted)]
        begin = 0
        for end, row in zip(ends, wanted[[0, *ends[:-1]]].tolist(), strict=True):
            self._read_into(data[begin * row_bytes : end * row_bytes], offset + row * row_bytes)
            begin = end
        return values if torch.equal(wanted, indices) else values[places]

    def header(self) -> bytes:
        """The bytes before the data, as they are in the file now."""
        begin = min((tensor.offset for tensor in self.tensors.values()), default=self.size)
        header = bytearray(begin)
        self._read_into(memoryview(header), 0)
        return bytes(header)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, out: Tensor, offset: int, strides: Sequence[int]) -> None:
        """Fill `out` from the elements that lie `strides` apart in the file, the first at byte `offset`."""
        if not out.numel():
            return
        item = out.dtype.itemsize
        steps = [(size - 1) * stride for size, stride in zip(out.shape, strides, strict=True)]
        span = sum(steps) + 1  # elements from the first to the last
        dense = span == out.numel()
        if dense and out.is_contiguous():
            self._read_into(bytes_of(out), offset)
            return
        long_runs = not dense and _run(out.shape, strides) * item >= _LONG_RUN
        if span * item <= SLAB_BYTES and not long_runs:
            slab = torch.empty(span, dtype=out.dtype)
            self._read_into(bytes_of(slab), offset)
            out.copy_(slab.as_strided(out.shape, strides))
            return
        dimension = next(index for index, size in enumerate(out.shape) if size > 1)
        stride, one = strides[dimension], span - steps[dimension]
        count = 1 if long_runs else max((SLAB_BYTES // item - one) // stride + 1, 1)
        for start in range(0, out.shape[dimension], count):
            part = out.narrow(dimension, start, min(count, out.shape[dimension] - start))
            self._fill(part, offset + start * stride * item, strides)

    def _read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the file's bytes from `offset`."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._file.fileno(), [target[done : done + _LARGEST_READ]], offset + done)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not count:
                self._refuse(f"it ends at byte {offset + done} and was longer when it was opened")
            done += count

    def _read_header(self) -> dict[str, StoredTensor]:
        prefix = self._read_begin(8, 0)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(self.size - 8, _LARGEST_HEADER):
            self._refuse_kind()
        text = self._read_begin(length, 8)
        if not text.startswith(b"{"):
            self._refuse_kind()
        try:
            header: dict[str, Any] = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
            header.pop("__metadata__", None)
            tensors = {name: _parse_entry(entry, 8 + length) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._refuse(f"its header: {type(error).__name__} {error}")
        self._check_places(tensors, 8 + length)
        return tensors

    def _read_begin(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _check_places(self, tensors: dict[str, StoredTensor], begin: int) -> None:
        """The data of all tensors fill the file from `begin` to its end, without a gap or an overlap."""
        place = begin
        for name, (dtype, shape, offset) in sorted(tensors.items(), key=lambda item: item[1].offset):
            size = math.prod(shape) * dtype.itemsize
            if size and offset != place:
                self._refuse(f"tensor {name} begins at byte {offset} instead of {place}")
            place += size
        if place != self.size:
            self._refuse(f"{self.size} bytes instead of {place}")

    def _refuse_kind(self) -> NoReturn:
        raise UserError(f"{self.path}: damaged, or not a safetensors file at all; {self._remedy}")

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: damaged ({problem}); {self._remedy}")


def _parse_entry(entry: dict[str, Any], begin: int) -> StoredTensor:
    """A tensor from its entry in the header. Raises ValueError, TypeError, KeyError or AttributeError."""
    dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
        raise ValueError("of a tensor with sizes or offsets that are not whole numbers")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"of a tensor of shape {shape} with {last - first} bytes of data")
    return StoredTensor(dtype, tuple(shape), begin + first)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def _run(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements that follow each other in the file at the region's beginning."""
    run = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size > 1 and stride != run:
            break
        run *= size
    return run


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    data: memoryview = tensor.view(-1).view(torch.uint8).numpy().data
    return data
