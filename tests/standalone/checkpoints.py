"""Checkpoints of given weights, as any number of tensor-parallel ranks would write them, without a training run."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mf_train.checkpoint.layout import (
    FORMAT,
    KINDS,
    MANIFEST,
    FileRecord,
    Manifest,
    assign_parts,
    part_name,
    read_manifest,
)
from mf_train.checkpoint.probe import probe_tensors, random_tokens
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import bytes_of, file_bytes
from mf_train.checkpoint.save import Extras, part_layouts, write_extras
from mf_train.config import Config, ModelConfig
from mf_train.config.loading import config_to_tree
from mf_train.model import MemoryFormer
from mf_train.model.memory import record_codes
from mf_train.model.sharding import slice_of_rank, slice_shape
from mf_train.standalone.conversion.streamed_model import CheckpointWeights, compute, streamed_model
from mf_train.standalone.folder import CERTIFICATE
from tests.models import random_model
from tests.training.runs import TOKENIZER as SHIPPED


def write_checkpoint(folder: Path, config: ModelConfig, weights: dict[str, Tensor], tensor: int) -> Path:
    """A float32 checkpoint of `weights` without moments; its probe is what the plain model computes."""
    folder.mkdir(parents=True)
    _write_extras(folder, config, _probe(config, weights))
    write_slices(folder, {"master": weights}, tensor)
    return folder


def _write_extras(folder: Path, config: ModelConfig, probe: dict[str, Tensor]) -> dict[str, FileRecord]:
    state = {"step": 7, "tokens": 700, "device": "cpu", "stream": None}
    text = yaml.safe_dump(config_to_tree(Config(model=config)))
    return write_extras(
        folder, Extras(state, text, {"tokenizer.model": (SHIPPED / "tokenizer.model").read_bytes()}, probe)
    )


def write_slices(
    folder: Path,
    values: Mapping[str, Mapping[str, Tensor]],
    tensor: int,
    step: int = 7,
    part_bytes: int = 1 << 30,
) -> None:
    """Every rank's parts of `values` (kind -> name -> whole parameter), and the manifest of all that is in `folder`."""
    weights = values["master"]
    sizes = {name: value.nbytes // tensor for name, value in weights.items()}
    parts = assign_parts(sizes, part_bytes)
    for kind, whole in values.items():
        for rank in range(tensor):
            for part in sorted(set(parts.values())):
                local = {n: slice_of_rank(whole[n], n, rank, tensor) for n in whole if parts[n] == part}
                write_tensors(folder / part_name(kind, rank, tensor, part), local)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    kinds = tuple(kind for kind in KINDS if kind in values)
    manifest = Manifest(FORMAT, step, tensor, kinds, shapes, parts, records(folder))
    (folder / MANIFEST).write_text(manifest.to_json())


def write_large(folder: Path, config: ModelConfig, tensor: int) -> Path:
    """A float32 checkpoint of repeated noise without moments, of any size: little of it is in memory at a time."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in MemoryFormer(config).named_parameters()}
    local = {name: torch.Size(slice_shape(name, shape, tensor)) for name, shape in shapes.items()}
    parts = assign_parts({name: 4 * shape.numel() for name, shape in local.items()})
    noise = 0.3 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(1))
    files = {}
    for rank in range(tensor):
        for part, layout in part_layouts(local, parts).items():
            path = folder / part_name("master", rank, tensor, part)
            with path.open("wb") as file:
                file.write(layout.header)
                for index, shape in enumerate(local[name] for name in layout.tensors):
                    left, values = shape.numel(), noise.roll(1009 * index)
                    while left:
                        file.write(bytes_of(values[:left]))
                        left -= min(left, len(values))
            with path.open("rb") as file:
                checksum = 0
                while piece := file.read(1 << 22):
                    checksum = zlib.crc32(piece, checksum)
            files[path.name] = FileRecord(path.stat().st_size, checksum)
    manifest = Manifest(FORMAT, 7, tensor, ("master",), shapes, parts, files)
    (folder / MANIFEST).write_text(manifest.to_json())
    model = streamed_model(config, CheckpointWeights(CheckpointReader(folder), "float32"))
    results = compute(model, random_tokens(config))
    probe = probe_tensors(results.tokens, results.logits, results.codes, validation=False)
    manifest.files.update(_write_extras(folder, config, probe))
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def flip(file: Path, place: int | None = None) -> None:
    """Flip a bit of the byte at a place of a file; by default in its middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 16
    file.write_bytes(data)


def records(folder: Path) -> dict[str, FileRecord]:
    """Sizes and checksums of the files of a checkpoint, but the manifest's own."""
    contents = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    return {name: FileRecord(len(data), zlib.crc32(data)) for name, data in contents.items()}


def renew_manifest(checkpoint: Path) -> None:
    """Have the manifest hold the files of a checkpoint as they are now."""
    manifest = read_manifest(checkpoint, check_sizes=False)
    manifest.files.clear()
    manifest.files.update(records(checkpoint))
    (checkpoint / MANIFEST).write_text(manifest.to_json())


def certificate_of(model: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((model / CERTIFICATE).read_text())
    return tree


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights far from the initial ones: biases and norms differ from 0 and 1, and tables are large."""
    return random_model(config, seed, torch.float32, std=0.3).state_dict()


def _probe(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model = MemoryFormer(config)
    model.load_state_dict(weights)
    tokens = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record_codes(model) as codes:
        logits = model(tokens[None])[0]
    return {"tokens": tokens, "logits": logits} | {f"codes.{name}": value[0] for name, value in codes.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of `tensors`."""
    path.write_bytes(file_bytes(tensors))
