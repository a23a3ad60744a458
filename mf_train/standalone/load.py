"""Loads a standalone model as the plain model, without transformers and without running the folder's own code."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mf_train.config.model import ModelConfig
from mf_train.errors import UserError
from mf_train.model.model import MemoryFormer
from mf_train.standalone.names import CONFIG_KEYS, PARAMETER_PREFIX
from mf_train.standalone.weights import INDEX, SINGLE

CONFIG = "config.json"


def load_model(folder: Path) -> MemoryFormer:
    """The model in the dtype of its files, on the CPU, for inference. Raises UserError naming the file."""
    with torch.device("meta"):
        model = MemoryFormer(read_model_config(folder))
    state = {name.removeprefix(PARAMETER_PREFIX): value for name, value in _read_tensors(folder).items()}
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted({*expected, *state}):
        found = tuple(state[name].shape) if name in state else None
        if found != expected.get(name):
            raise UserError(
                f"{folder}: tensor {PARAMETER_PREFIX}{name} is {found or 'missing'}, and {CONFIG} asks for "
                f"{expected.get(name, 'none')}: convert the checkpoint again"
            )
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def read_model_config(folder: Path) -> ModelConfig:
    """The model section of config.json. Raises UserError where the folder is not a converted model."""
    path = folder / CONFIG
    if not path.is_file():
        problem = "has no config.json" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {problem}; give a model that 'memoryformer convert' made")
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if tree.get("model_type") != "memoryformer":
            raise UserError(
                f"{path}: model_type is {tree.get('model_type')!r}; give a model that 'memoryformer convert' made"
            )
        keys = {field.name: CONFIG_KEYS.get(field.name, field.name) for field in fields(ModelConfig)}
        return ModelConfig(**{name: tree[key] for name, key in keys.items()})
    except KeyError as error:
        raise UserError(f"{path}: has no key {error}; convert the checkpoint again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); convert the checkpoint again") from None


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / INDEX
    try:
        files = [SINGLE]
        if path.is_file():
            files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        tensors: dict[str, Tensor] = {}
        for file in files:
            path = folder / file
            tensors |= load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); convert the checkpoint again") from None
    return tensors
