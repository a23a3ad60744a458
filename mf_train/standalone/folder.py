"""A standalone model's folder: the names of its files, what its config.json says, and where its tensors are."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_train.checkpoint.safetensors_file import StoredTensor, TensorFile
from mf_train.config.model import ModelConfig
from mf_train.errors import UserError
from mf_train.model.model import MemoryFormer
from mf_train.model.quantized import use_int8
from mf_train.standalone.exported.names import CONFIG_KEYS, INT8, PARAMETER_PREFIX, TABLE_DTYPE

DTYPES = ("float32", "bfloat16", INT8)  # of the weights, as `convert --dtype` names them
CONFIG, CARD, CERTIFICATE = "config.json", "README.md", "certificate.json"
# One file of weights, or the index of several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REMEDY = "convert the checkpoint again"
# Keys of ModelConfig that every converted model has; one that was converted before another came has that one's default.
_FIRST_KEYS = (
    "kind",
    "hidden_size",
    "num_layers",
    "num_heads",
    "bits",
    "expand_bits",
    "score",
    "temperature",
    "norm",
    "ffn_inner_norm",
    "ffn_activation",
    "norm_epsilon",
    "rotary_fraction",
    "rotary_base",
    "vocab_size",
    "sequence_length",
)


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
            raise UserError(f"{path}: dtype is {tree['dtype']!r}; {REMEDY}")
        if tree.get(TABLE_DTYPE) not in (None, INT8):
            raise UserError(
                f"{path}: {TABLE_DTYPE} is {tree[TABLE_DTYPE]!r}, and this version knows only {INT8!r}; {REMEDY}"
            )
        keys = {field.name: CONFIG_KEYS.get(field.name, field.name) for field in fields(ModelConfig)}
        given = {name: key for name, key in keys.items() if key in tree or name in _FIRST_KEYS}
        model = ModelConfig(**{name: tree[key] for name, key in given.items()})
    except KeyError as error:
        raise UserError(f"{path}: has no key {error}; {REMEDY}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error}); {REMEDY}") from None
    return model, dtype, tree.get(TABLE_DTYPE) == INT8


def empty_model(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    int8: bool,
    tensors: Mapping[str, Tensor | StoredTensor],
    files: Mapping[str, Path],
) -> MemoryFormer:
    """The model of `read_config` on the meta device, once `tensors` (by outside name) are known to be its own.

    Raises UserError naming the tensor and its file (of `files`).
    """
    check_layers(config, len(tensors), folder / CONFIG)
    if f"{PARAMETER_PREFIX}head.weight" not in tensors and _ties_head(folder):
        raise UserError(
            f"{folder}: tie_word_embeddings is true in {CONFIG}, and the files hold one weight for embedding and head: "
            "use the model with transformers, which ties them"
        )
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
                f"{expected.get(name, 'none')}; {REMEDY}"
            )
    return model


def _ties_head(folder: Path) -> bool:
    return bool(json.loads((folder / CONFIG).read_bytes()).get("tie_word_embeddings"))


def _describe(tensor: Tensor | StoredTensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def check_layers(config: ModelConfig, tensors: int, path: Path) -> None:
    """Refuse to build a model of more blocks than there are tensors: `path` is not to be trusted, and each block takes
    time and memory even without weights. Raises UserError.
    """
    if config.num_layers > tensors:
        raise UserError(
            f"{path}: damaged (it asks for {config.num_layers} blocks, and the files hold {tensors} tensors); restore "
            "it, or convert again"
        )


def open_tensors(folder: Path) -> dict[str, TensorFile]:
    """The file of every tensor of a standalone folder, by the tensor's outside name. Raises UserError or OSError."""
    path = folder / INDEX
    if not path.is_file():
        return _open(folder / SINGLE)
    found: dict[str, TensorFile] = {}
    try:
        index: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        files = sorted(set(index.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged; {REMEDY}") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: damaged ({file!r} is not a file's name); {REMEDY}")
        found |= _open(folder / file)
    for name in sorted({*found, *index}):
        if name not in found or index.get(name) != found[name].path.name:
            raise UserError(f"{path}: tensor {name} is not where it says; {REMEDY}")
    return found


def _open(path: Path) -> dict[str, TensorFile]:
    try:
        file = TensorFile(path, REMEDY)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {REMEDY}") from None
    return dict.fromkeys(file.tensors, file)
