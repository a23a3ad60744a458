"""Copies a checkpoint's weights into safetensors files, slice by slice: memory is bounded by a slice."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mf_train.checkpoint.read import CheckpointReader, Region
from mf_train.checkpoint.tensor_file import TensorFileWriter
from mf_train.standalone.names import PARAMETER_PREFIX

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2_000_000_000
SLICE_BYTES = 64_000_000

Shape = tuple[int, ...]


def copy_weights(
    reader: CheckpointReader, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> dict[str, str]:
    """Write every parameter in `dtype` under its outside name; returns the SHA-256 of each one's bytes in the file.

    One file `model.safetensors`, or shards of at most `shard_bytes` (a larger tensor has one of its own) and an
    index, as transformers expects. Raises UserError where the checkpoint is damaged, OSError where writing fails.
    """
    shards = _plan_shards(reader.shapes, dtype, shard_bytes)
    digests: dict[str, str] = {}
    for file, names in shards.items():
        layout = {PARAMETER_PREFIX + name: (dtype, reader.shapes[name]) for name in names}
        with TensorFileWriter(folder / file, layout, {"format": "pt"}) as writer:
            for name in names:
                digests[PARAMETER_PREFIX + name] = _copy_tensor(reader, name, dtype, writer)
    if len(shards) > 1:
        _write_index(folder / INDEX, reader.shapes, shards, dtype)
    return digests


def _copy_tensor(reader: CheckpointReader, name: str, dtype: torch.dtype, writer: TensorFileWriter) -> str:
    digest = hashlib.sha256()
    for region in row_major_regions(reader.shapes[name], SLICE_BYTES // torch.float32.itemsize):
        part = reader.read(name, region=region).to(dtype).contiguous()
        writer.append(part)
        digest.update(part.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _plan_shards(shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int) -> dict[str, list[str]]:
    """File name -> parameters, in the checkpoint's order."""
    groups: list[list[str]] = []
    filled = limit
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if not groups or filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_index(
    path: Path, shapes: Mapping[str, Shape], shards: Mapping[str, list[str]], dtype: torch.dtype
) -> None:
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    index = {
        "metadata": {"total_size": parameters * dtype.itemsize, "total_parameters": parameters},
        "weight_map": {PARAMETER_PREFIX + name: file for file, names in shards.items() for name in names},
    }
    path.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
