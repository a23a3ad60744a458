"""Loads a standalone model as the plain model, without running the folder's own code."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mf_train.errors import UserError
from mf_train.model.model import MemoryFormer
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import INDEX, SINGLE, empty_model, read_config


def load_model(folder: Path) -> MemoryFormer:
    """The model in the dtypes of its files, on the CPU, for inference. Raises UserError naming file and tensor.

    The files are mapped into memory and not copied: pages are read when they are used and shared by all processes
    that load the same folder. Do not write into the files, nor shorten them, while a model uses them.
    """
    settings = read_config(folder)
    tensors, files = _read_tensors(folder)
    model = empty_model(folder, *settings, tensors, files)
    state = {name.removeprefix(PARAMETER_PREFIX): tensor for name, tensor in tensors.items()}
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


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
