"""Writing a checkpoint: every tensor-parallel rank its slices, spread over data-parallel ranks; complete or absent."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_train.checkpoint.layout import (
    CONFIG,
    FORMAT,
    KINDS,
    LATEST,
    MANIFEST,
    PROBE,
    STATE,
    TOKENIZER,
    Manifest,
    list_checkpoints,
    part_name,
    step_name,
)
from mf_train.checkpoint.tensor_file import TensorFileWriter
from mf_train.errors import PeerError, TrainingError
from mf_train.model.initialise import split_dimension
from mf_train.parallel.agreement import together
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine

MAX_PARTS = 8  # files of one kind and tensor-parallel rank; more would not write faster


@dataclass(frozen=True)
class Extras:
    """What a checkpoint holds beside the tensors."""

    state: Mapping[str, Any]
    config_yaml: str
    tokenizer: bytes  # empty where the run has only token ids
    probe: Mapping[str, Tensor]


def save_checkpoint(engine: Engine, folder: Path, step: int, extras: Extras | None, keep: int) -> Path:
    """Write `folder`/step-N, point `latest` to it and delete all but the newest `keep` (0: none). Collective.

    Rank 0 gives `extras`.

    The files are written beside, synced, and the folder renamed at the end: it is complete or absent.
    Raises TrainingError on rank 0 if any could not write, and PeerError on the others.
    """
    try:
        return _save(engine, folder, step, extras, keep)
    except (OSError, PeerError) as error:
        if engine.groups.degrees.rank == 0:
            shutil.rmtree(_partial(folder, step), ignore_errors=True)
        if isinstance(error, PeerError):
            raise
        complete = [path.name for path in list_checkpoints(folder)]
        raise TrainingError(
            f"{folder}: the checkpoint of step {step} could not be written ({error.strerror or error}); the newest "
            f"complete one is {complete[-1] if complete else 'none'}: make room or mend the folder, and run again"
        ) from error


def _partial(folder: Path, step: int) -> Path:
    return folder / f".{step_name(step)}.partial"


def _save(engine: Engine, folder: Path, step: int, extras: Extras | None, keep: int) -> Path:
    degrees = engine.groups.degrees
    final = folder / step_name(step)
    partial = _partial(folder, step)
    shapes = {name: engine.local_shape(p) for name, p in engine.model.named_parameters()}
    parts = _assign_parts(shapes, min(degrees.data, MAX_PARTS))

    def prepare() -> None:
        if degrees.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def finish() -> None:
        if degrees.rank == 0:
            assert extras is not None
            _write_extras(partial, extras)
            _write_manifest(partial, step, degrees, shapes, parts)
            _replace_folder(partial, final)
            _point_latest(folder, final.name)
            _rotate(folder, keep)

    together(prepare, engine.device)
    for kind in KINDS:
        _write_kind(engine, partial, kind, parts, shapes)
    together(finish, engine.device)
    return final


def _write_kind(
    engine: Engine, folder: Path, kind: str, parts: Mapping[str, int], shapes: Mapping[str, torch.Size]
) -> None:
    """Masters or one moment: each data-parallel rank with a part's number writes that part. Collective."""
    degrees = engine.groups.degrees
    fragments = engine.fragments()
    mine = {name: (torch.float32, shapes[name]) for name, part in parts.items() if part == degrees.data_rank}
    path = folder / part_name(kind, degrees.tensor_rank, degrees.tensor, degrees.data_rank)

    # a rank that cannot write goes on receiving, so that the others' collectives end; then all raise together
    failure: OSError | None = None
    writer: TensorFileWriter | None = None
    try:
        writer = TensorFileWriter(path, mine) if mine else None
    except OSError as error:
        failure = error
    for name, part in parts.items():
        tensor = engine.collect(name, fragments.get(name), kind, part)
        if writer is not None and tensor is not None and failure is None:
            try:
                writer.write(name, tensor)
            except OSError as error:
                failure = error

    def close() -> None:
        if failure is not None:
            raise failure
        if writer is not None:
            writer.__exit__(None, None, None)

    together(close, engine.device)


def _assign_parts(shapes: Mapping[str, torch.Size], parts: int) -> dict[str, int]:
    """Part of each parameter: largest first, always to the emptiest part."""
    filled = [0] * parts
    assigned = {}
    for name in sorted(shapes, key=lambda name: (-shapes[name].numel(), name)):
        part = filled.index(min(filled))
        assigned[name] = part
        filled[part] += shapes[name].numel()
    return {name: assigned[name] for name in shapes}


def _write_manifest(
    folder: Path, step: int, degrees: Degrees, shapes: Mapping[str, torch.Size], parts: dict[str, int]
) -> None:
    parameters = {}
    for name, shape in shapes.items():
        parameters[name] = list(shape)
        parameters[name][split_dimension(name)] *= degrees.tensor
    manifest = Manifest(
        format=FORMAT,
        step=step,
        tensor_parallel=degrees.tensor,
        parameters=parameters,
        parts=parts,
        files={path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    )
    _write_synced(folder / MANIFEST, manifest.to_json().encode())


def _write_extras(folder: Path, extras: Extras) -> None:
    _write_synced(folder / STATE, (json.dumps(extras.state, indent=1) + "\n").encode())
    _write_synced(folder / CONFIG, extras.config_yaml.encode())
    if extras.tokenizer:
        _write_synced(folder / TOKENIZER, extras.tokenizer)
    with TensorFileWriter(folder / PROBE, {n: (t.dtype, t.shape) for n, t in extras.probe.items()}) as writer:
        for name, tensor in extras.probe.items():
            writer.write(name, tensor)


def _replace_folder(new: Path, place: Path) -> None:
    """Put `new` at `place`; what stood there (a run that went back) is deleted only afterwards."""
    old = place.with_name(f".{place.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _point_latest(folder: Path, name: str) -> None:
    beside = folder / f".{LATEST}.partial"
    _write_synced(beside, f"{name}\n".encode())
    os.replace(beside, folder / LATEST)


def _rotate(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder)[: -keep or None] if keep else []:
        shutil.rmtree(old)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
