"""`memoryformer convert MODEL OUT --to-checkpoint`: a standalone model becomes a checkpoint to go on training from."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_train.checkpoint.layout import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    Manifest,
    assign_parts,
)
from mf_train.checkpoint.probe import probe_tensors, random_tokens
from mf_train.checkpoint.safetensors_file import Region, TensorFile, bytes_of
from mf_train.checkpoint.save import Extras, write_extras
from mf_train.config import Config, DataConfig, ParallelConfig, TokenizerConfig, TrainingConfig
from mf_train.config.loading import config_to_tree
from mf_train.config.yaml_text import yaml_text
from mf_train.data.open_tokenizer import is_own_file, load_tokenizer, tokenizer_in
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.files import write_synced
from mf_train.model.layers import tensor_problem
from mf_train.model.sharding import slice_shape
from mf_train.run_folder import TOKENIZER_JSON
from mf_train.standalone.conversion.checkpoint_parts import write_parts
from mf_train.standalone.conversion.convert import check_output, new_folder
from mf_train.standalone.conversion.streamed_model import FolderWeights, compute, streamed_model
from mf_train.standalone.conversion.tokenizer_files import tokenizer_files
from mf_train.standalone.conversion.weights import SLICE_BYTES, whole_rows
from mf_train.standalone.exported.names import DOCUMENT_ATTENTION, PARAMETER_PREFIX
from mf_train.standalone.folder import CERTIFICATE, read_config
from mf_train.standalone.folder import CONFIG as MODEL_CONFIG
from mf_train.text import human_bytes

_STATE = {"step": 0, "tokens": 0, "device": "cpu", "stream": None}


def to_checkpoint(model: Path, output: Path, tensor: int) -> Iterator[str]:
    """Write a checkpoint of step 0 for `tensor` tensor-parallel ranks into `output`, which is complete or absent.

    `model` is a folder that `convert` made, in float32 or bfloat16. Its weights become the float32 masters, bit for
    bit; the moments are zero. Training goes on from it with any number of ranks (`checkpoint.resume`); of `tensor`
    depends only how it is laid out. Yields lines to show.

    Raises UserError for a model that cannot be used, is damaged or is not what its certificate says, and for an
    `output` that exists; OSError where reading or writing fails. Neither leaves anything at `output`.
    """
    started = time.perf_counter()
    output = Path(os.path.abspath(output))
    check_output(output)
    config, tokenizer = _configuration(model, tensor)
    weights = FolderWeights(model)  # every tensor is there as config.json says
    with new_folder(output, last=MANIFEST) as folder:
        manifest = _write_weights(model, weights, config, folder)
        tokens = random_tokens(config.model)
        results = compute(streamed_model(config.model, weights), tokens)
        probe = probe_tensors(tokens, results.logits, results.codes, validation=False)
        text = yaml_text(config_to_tree(config))
        manifest.files.update(write_extras(folder, Extras(_STATE, text, tokenizer, probe)))
        write_synced(folder / MANIFEST, manifest.to_json().encode())
    size = sum(path.stat().st_size for path in output.iterdir())
    yield (
        f"wrote {output}: {len(manifest.parameters)} parameters of a model in {config.training.precision} as float32 "
        f"masters for {tensor} tensor-parallel ranks, {human_bytes(size)}, {time.perf_counter() - started:.1f} s"
    )
    yield f"train from it: memoryformer train CONFIG checkpoint.resume={output}"


def _configuration(folder: Path, tensor: int) -> tuple[Config, dict[str, bytes]]:
    """What the checkpoint's config.yaml says, and the tokenizer's files; none where the model has no tokenizer."""
    model, dtype, int8 = read_config(folder)
    precisions = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    if int8 or dtype not in precisions:
        kind = "int8" if int8 else str(dtype).removeprefix("torch.")
        raise UserError(f"{folder}: its weights are {kind}: give a model in float32 or bfloat16")
    if problem := tensor_problem(model, tensor, "--tensor"):
        raise UserError(problem)
    tree: dict[str, Any] = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
    model_file = folder / TOKENIZER
    own = model_file.is_file() and is_own_file(model_file)  # which says its end of text itself
    end_of_text_id = None if own else tree.get("eos_token_id")
    if not own and type(end_of_text_id) is not int:
        raise UserError(
            f"{folder / MODEL_CONFIG}: eos_token_id is {end_of_text_id!r}: it must be a token's id"
        )
    tokenizer = _read_tokenizer(folder, model.sequence_length, end_of_text_id)
    config = Config(
        model=model,
        data=DataConfig(document_attention=tree.get(DOCUMENT_ATTENTION) is True),
        tokenizer=TokenizerConfig(end_of_text_id=end_of_text_id),
        parallel=ParallelConfig(tensor=tensor),
        training=TrainingConfig(precision=precisions[dtype]),  # type: ignore[arg-type]
    )
    return config, tokenizer.files if tokenizer else {}


def _read_tokenizer(folder: Path, sequence_length: int, end_of_text_id: int | None) -> Tokenizer | None:
    """That of `tokenizer.model` where it is there, of which the folder's tokenizer.json must have been made, or else of
    tokenizer.json; None without both.
    """
    path, made = folder / TOKENIZER, folder / TOKENIZER_JSON
    if not path.is_file():
        return tokenizer_in(folder, end_of_text_id) if made.is_file() else None
    tokenizer = load_tokenizer(TokenizerConfig(path=str(path), end_of_text_id=end_of_text_id))
    expected = tokenizer_files(tokenizer, sequence_length)[made.name]
    try:
        same = _of_ids(json.loads(made.read_bytes())) == _of_ids(json.loads(expected))
    except (FileNotFoundError, ValueError, RecursionError):
        same = False
    if not same:
        raise UserError(f"{made}: is not what {path.name} gives; restore both from the same model")
    return tokenizer


def _of_ids(tree: Any) -> Any:
    """What a tokenizer.json says of a text's ids; transformers saves more, such as how the last batch was padded."""
    if not isinstance(tree, dict):
        return tree
    rest = tree | {"padding": None, "truncation": None}
    template = rest.get("post_processor") or {}
    if template.get("type") == "TemplateProcessing" and not template.get("special_tokens"):
        rest["post_processor"] = None  # it adds nothing
    return rest


def _write_weights(model: Path, weights: FolderWeights, config: Config, folder: Path) -> Manifest:
    """Every parameter's slices; returns the manifest with the records of their files."""
    shapes, ranks = weights.shapes, config.parallel.tensor
    local = {name: torch.Size(slice_shape(name, shape, ranks)) for name, shape in shapes.items()}
    parts = assign_parts({name: 4 * shape.numel() for name, shape in local.items()})
    certified, files = _certified_hashes(model), weights.files

    def read(kind: str, name: str, buffer: Tensor) -> Iterator[tuple[Tensor, Region]]:
        digest, outside = hashlib.sha256(), PARAMETER_PREFIX + name
        yield from _read(files[outside], outside, buffer, digest)
        if certified is not None and certified.get(outside) != digest.hexdigest():
            raise UserError(
                f"{files[outside].path}: tensor {outside} is not what {CERTIFICATE} says: restore the file, or "
                f"delete {CERTIFICATE} if the weights were changed on purpose"
            )

    records = write_parts(folder, shapes, parts, ranks, ("master",), read)
    return Manifest(FORMAT, 0, ranks, ("master",), shapes, parts, records)


def _read(file: TensorFile, name: str, buffer: Tensor, digest: Any) -> Iterator[tuple[Tensor, Region]]:
    """Float32 slices of a tensor and their regions, in order; `digest` gets the bytes that are stored."""
    dtype, shape, _ = file.tensors[name]
    for region in whole_rows(shape, SLICE_BYTES // 4):
        sizes = [part.stop - part.start for part in region]
        size = torch.Size(sizes).numel()
        stored = buffer[size:].view(dtype)[:size].view(sizes)
        file.read(name, region, stored)
        digest.update(bytes_of(stored))
        yield buffer[:size].view(sizes).copy_(stored), region


def _certified_hashes(model: Path) -> dict[str, str] | None:
    """SHA-256 of each tensor by its outside name; None for a model without a certificate, as others may save one."""
    path = model / CERTIFICATE
    try:
        hashes = json.loads(path.read_bytes())["tensors"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        hashes = None
    if not isinstance(hashes, dict):
        raise UserError(f"{path}: damaged; restore it, or delete it if the weights were changed on purpose")
    return hashes
