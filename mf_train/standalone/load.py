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
from mf_train.model.quantized import use_int8
from mf_train.standalone.names import CONFIG_KEYS, INT8, PARAMETER_PREFIX, TABLE_DTYPE
from mf_train.standalone.weights import INDEX, SINGLE

CONFIG = "config.json"


def load_model(folder: Path) -> MemoryFormer:
    """The model in the dtypes of its files, on the CPU, for inference. Raises UserError naming file and tensor.

    The files are mapped into memory and not copied: pages are read when they are used and shared by all processes
    that load the same folder. Do not write into the files, nor shorten them, while a model uses them.
    """
    config, dtype, int8 = read_config(folder)
    tensors, files = _read_tensors(folder)
    check_layers(config, len(tensors), folder / CONFIG)
    with torch.device("meta"):
        model = MemoryFormer(config).to(dtype)
        if int8:
            use_int8(model)
    expected = {PARAMETER_PREFIX + name: _describe(tensor) for name, tensor in model.state_dict().items()}
    for name in sorted({*expected, *tensors}):
        found = _describe(tensors[name]) if name in tensors else "missing"
        if found != expected.get(name):
            raise UserError(
                f"{files.get(name, folder)}: tensor {name} is {found}, and {CONFIG} asks for "
                f"{expected.get(name, 'none')}; convert the checkpoint again"
            )
    state = {name.removeprefix(PARAMETER_PREFIX): tensor for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def read_config(folder: Path) -> tuple[ModelConfig, torch.dtype, bool]:
    """Of config.json: the model section, the floating-point weights' dtype, and whether tables and head are int8.

    Raises UserError where the folder is not a converted model.
    """
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
        dtype = getattr(torch, tree["dtype"], None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise UserError(f"{path}: dtype is {tree['dtype']!r}; convert the checkpoint again")
        if tree.get(TABLE_DTYPE) not in (None, INT8):
            raise UserError(
                f"{path}: {TABLE_DTYPE} is {tree[TABLE_DTYPE]!r}, and this version knows only {INT8!r}; "
                "convert the checkpoint again"
            )
        keys = {field.name: CONFIG_KEYS.get(field.name, field.name) for field in fields(ModelConfig)}
        model = ModelConfig(**{name: tree[key] for name, key in keys.items()})
    except KeyError as error:
        raise UserError(f"{path}: has no key {error}; convert the checkpoint again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); convert the checkpoint again") from None
    return model, dtype, tree.get(TABLE_DTYPE) == INT8


def check_layers(config: ModelConfig, tensors: int, path: Path) -> None:
    """Refuse to build a model of more blocks than there are tensors: `path` is not to be trusted, and each block takes
    time and memory even without weights. Raises UserError.
    """
    if config.num_layers > tensors:
        raise UserError(
            f"{path}: damaged (it asks for {config.num_layers} blocks, and the files hold {tensors} tensors); restore "
            "it, or convert again"
        )


def _read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Path]]:
    """Every tensor, mapped, and the file that it is in, by outside name."""
    path = folder / INDEX
    tensors: dict[str, Tensor] = {}
    origins: dict[str, Path] = {}
    try:
        files = [SINGLE]
        if path.is_file():
            files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        for file in files:
            path = folder / file
            found = load_file(path)
            tensors |= found
            origins |= dict.fromkeys(found, path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error}); convert the checkpoint again") from None
    return tensors, origins


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
