"""Copies a checkpoint's weights into safetensors files, slice by slice: memory is bounded by a few slices."""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from mf_train.checkpoint.read import CheckpointReader, Checksums
from mf_train.checkpoint.safetensors_file import ALIGNMENT, FileLayout, Region, bytes_of
from mf_train.errors import TrainingError
from mf_train.model.quantized import quantize_rows, row_scales, scales_name
from mf_train.processors import usable_processors
from mf_train.standalone.conversion.shard_writer import ShardWriter
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import INDEX, SINGLE

SHARD_BYTES = 2_000_000_000
SLICE_BYTES = 4 << 20  # of float32 values that a thread holds at a time
MAX_THREADS = 8  # bounds memory; a disk is busy with fewer

Shape = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """One tensor of the files. `convert` makes some rows of it from the same rows of a parameter's float32 values."""

    parameter: str
    dtype: torch.dtype
    shape: Shape
    convert: Callable[[Tensor], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def copy_weights(
    reader: CheckpointReader, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write every parameter in `dtype` under its outside name; returns the SHA-256 of each tensor's bytes in the file.

    For torch.int8, tables and head are int8 with float32 `scales` beside them and all other parameters bfloat16.
    One file `model.safetensors`, or shards of at most `shard_bytes` (a larger tensor has one of its own) and an
    index, as transformers expects. The checksums of the checkpoint's files are compared on the way. Raises UserError
    where the checkpoint is damaged, TrainingError where values that are not finite cannot be int8, OSError where
    writing fails.
    """
    tensors = stored_tensors(reader.shapes, dtype)
    shards = _plan_shards(tensors, shard_bytes)
    layouts = {
        file: FileLayout(
            {name: (tensors[name].dtype, tensors[name].shape) for name in names}, {"format": "pt"}
        )
        for file, names in shards.items()
    }
    files = {name: file for file, names in shards.items() for name in names}
    with ShardWriter(folder, layouts) as writer:
        digests = convert_weights(reader, tensors, lambda name, *part: writer.write(files[name], name, *part))
    if len(shards) > 1:
        _write_index(folder / INDEX, reader.shapes, tensors, shards)
    return digests


def convert_weights(
    reader: CheckpointReader, tensors: Mapping[str, Stored], write: Callable[[str, int, memoryview], None]
) -> dict[str, str]:
    """Give the bytes of `stored_tensors` to write(name, place in the tensor, bytes), by threads, slice by slice.

    Returns each tensor's SHA-256. Raises as `copy_weights`.
    """
    made_of: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        made_of.setdefault(stored.parameter, {})[name] = stored
    checksums = Checksums()

    def convert(parameter: str, buffer: Tensor) -> dict[str, str]:
        digests = {name: hashlib.sha256() for name in made_of[parameter]}
        for name, place, data in _convert(reader, parameter, made_of[parameter], buffer, checksums):
            write(name, place, data)
            digests[name].update(data)
        return {name: digest.hexdigest() for name, digest in digests.items()}

    found = in_threads(reader.shapes, convert)
    checksums.check(reader.manifest)
    return {name: found[stored.parameter][name] for name, stored in tensors.items()}


def stored_tensors(shapes: Mapping[str, Shape], dtype: torch.dtype) -> dict[str, Stored]:
    """What the files hold for a checkpoint's parameters, by outside name, in the checkpoint's order."""
    tensors = {}
    floats = torch.bfloat16 if dtype == torch.int8 else dtype
    for name, shape in shapes.items():
        outside, scales = PARAMETER_PREFIX + name, scales_name(name)
        if dtype == torch.int8 and scales:
            tensors[outside] = Stored(name, torch.int8, shape, lambda rows: quantize_rows(rows)[0])
            tensors[PARAMETER_PREFIX + scales] = Stored(name, torch.float32, shape[:-1], row_scales)
        else:
            tensors[outside] = Stored(name, floats, shape, lambda values: values.to(floats))
    return tensors


def _convert(
    reader: CheckpointReader,
    parameter: str,
    tensors: Mapping[str, Stored],
    buffer: Tensor,
    checksums: Checksums,
) -> Iterator[tuple[str, int, memoryview]]:
    """(name, place in the tensor, bytes) of each tensor that is made of a parameter, a slice at a time."""
    places = dict.fromkeys(tensors, 0)
    for region in whole_rows(reader.shapes[parameter], SLICE_BYTES // torch.float32.itemsize):
        values = reader.read(parameter, region=region, buffer=buffer, checksums=checksums)
        for name, stored in tensors.items():
            part = stored.convert(values).contiguous()
            if stored.convert is row_scales and not part.isfinite().all():
                raise TrainingError(
                    f"{reader.checkpoint}: {parameter} holds values that are not finite and cannot be int8; "
                    "use an earlier checkpoint"
                )
            yield name, places[name], bytes_of(part)
            places[name] += part.nbytes


def in_threads(shapes: Mapping[str, Shape], work: Callable[[str, Tensor], T]) -> dict[str, T]:
    """`work(name, buffer)` of each parameter; a thread does one at a time, the largest first.

    Hashing, the slowest step of a copy, has an order within a tensor only. `buffer` holds the float32 values of two
    slices and is the thread's own: a new one for each slice would leave the heap in pieces, several times as large.
    Raises what a call raises; no more are begun then.
    """
    longest_row = max(shape[-1] if len(shape) > 1 else 1 for shape in shapes.values())
    size = 2 * max(SLICE_BYTES // torch.float32.itemsize, longest_row)
    own = threading.local()

    def run(name: str) -> T:
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(size, dtype=torch.float32)
        return work(name, own.buffer)

    largest_first = sorted(shapes, key=lambda name: -math.prod(shapes[name]))
    with ThreadPoolExecutor(min(usable_processors(), MAX_THREADS)) as pool:
        futures = {name: pool.submit(run, name) for name in largest_first}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def whole_rows(shape: Shape, max_elements: int) -> Iterator[Region]:
    """As `row_major_regions`, but the last of several dimensions is never cut, however long it is."""
    if len(shape) == 1:
        yield from row_major_regions(shape, max_elements)
        return
    for region in row_major_regions(shape[:-1], max(max_elements // shape[-1], 1)):
        yield (*region, slice(0, shape[-1]))


def row_major_regions(shape: Shape, max_elements: int) -> Iterator[Region]:
    """Regions of at most `max_elements` (at least 1) that cover `shape` in the order of its elements in memory."""
    inner = torch.Size(shape[1:]).numel()
    if inner <= max_elements:
        rows = max_elements // max(inner, 1)
        for start in range(0, shape[0], rows):
            rest = (slice(0, size) for size in shape[1:])
            yield (slice(start, min(start + rows, shape[0])), *rest)
        return
    for row in range(shape[0]):
        for region in row_major_regions(shape[1:], max_elements):
            yield (slice(row, row + 1), *region)


def _plan_shards(tensors: Mapping[str, Stored], limit: int) -> dict[str, list[str]]:
    """File name -> tensors: in the checkpoint's order over the files, by alignment within each."""
    groups: list[list[str]] = []
    filled = limit
    for name, stored in tensors.items():
        if not groups or filled + stored.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += stored.nbytes
    for group in groups:
        # a file has no gaps: with falling divisors of the sizes, each tensor begins at a multiple of its own divisor,
        # and so every table whose size is a multiple of a cache line begins at one
        group.sort(key=lambda name: -math.gcd(tensors[name].nbytes, ALIGNMENT))
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_index(
    path: Path, shapes: Mapping[str, Shape], tensors: Mapping[str, Stored], shards: Mapping[str, list[str]]
) -> None:
    index = {
        "metadata": {
            "total_size": sum(stored.nbytes for stored in tensors.values()),
            "total_parameters": sum(torch.Size(shape).numel() for shape in shapes.values()),
        },
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
