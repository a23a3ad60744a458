"""Checkpoints of given weights, as any number of tensor-parallel ranks would write them, without a training run."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from torch import Tensor

from mf_train.checkpoint.layout import CONFIG, FORMAT, MANIFEST, PROBE, STATE, TOKENIZER, Manifest, part_name
from mf_train.checkpoint.tensor_file import TensorFileWriter
from mf_train.config import Config, ModelConfig
from mf_train.config.loading import config_to_tree
from mf_train.model import MemoryFormer
from mf_train.model.memory import record_codes
from mf_train.parallel.tensor import slice_of_rank
from tests.training.runs import TOKENIZER as SHIPPED


def write_checkpoint(folder: Path, config: ModelConfig, weights: dict[str, Tensor], tensor: int) -> Path:
    """A float32 checkpoint of `weights` without moments; its probe is what the plain model computes."""
    folder.mkdir(parents=True)
    for rank in range(tensor):
        local = {name: slice_of_rank(value, name, rank, tensor) for name, value in weights.items()}
        _write_tensors(folder / part_name("master", rank, tensor, 0), local)
    _write_tensors(folder / PROBE, _probe(config, weights))
    (folder / STATE).write_text(json.dumps({"step": 7, "tokens": 700, "device": "cpu"}))
    (folder / CONFIG).write_text(yaml.safe_dump(config_to_tree(Config(model=config))))
    (folder / TOKENIZER).write_bytes((SHIPPED / "tokenizer.model").read_bytes())
    shapes = {name: list(value.shape) for name, value in weights.items()}
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = Manifest(FORMAT, 7, tensor, shapes, dict.fromkeys(weights, 0), files)
    (folder / MANIFEST).write_text(manifest.to_json())
    return folder


def random_weights(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Weights far from the initial ones: biases and norms differ from 0 and 1, and tables are large."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in MemoryFormer(config).state_dict().items():
        noise = torch.randn(parameter.shape, generator=generator)
        weights[name] = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.3 * noise
    return weights


def _probe(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model = MemoryFormer(config)
    model.load_state_dict(weights)
    tokens = torch.randint(config.vocab_size, (24,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record_codes(model) as codes:
        logits = model(tokens[None])[0]
    return {"tokens": tokens, "logits": logits} | {f"codes.{name}": value[0] for name, value in codes.items()}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with TensorFileWriter(
        path, {name: (value.dtype, value.shape) for name, value in tensors.items()}
    ) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
