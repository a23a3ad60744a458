"""`memoryformer convert`: a training checkpoint of any degrees becomes a folder that transformers loads."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mf_train.checkpoint.layout import AVERAGE, CONFIG, TOKENIZER, resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config
from mf_train.config.loading import load_config
from mf_train.config.phases import Phase, phase_at, phases_of
from mf_train.data.open_tokenizer import tokenizer_in
from mf_train.errors import UserError
from mf_train.files import sync
from mf_train.model.counts import count_parameters
from mf_train.model.model import MemoryFormer
from mf_train.standalone.conversion.card import LICENSE, check_license, model_card
from mf_train.standalone.conversion.certificate import certificate_tree, hash_files
from mf_train.standalone.conversion.proof import Proof, prove
from mf_train.standalone.conversion.settings_files import settings_files
from mf_train.standalone.conversion.source_files import source_files
from mf_train.standalone.conversion.tokenizer_files import tokenizer_files
from mf_train.standalone.conversion.weights import copy_weights
from mf_train.standalone.exported.names import INT8
from mf_train.standalone.folder import CARD, CERTIFICATE, DTYPES, check_layers
from mf_train.standalone.folder import CONFIG as MODEL_CONFIG
from mf_train.text import human_bytes

_PARTIAL = ".partial"  # in an output folder that is there already: what is not complete yet
_METRICS = ("loss", "validation_loss", "validation_step", "validation", "evaluate", "evaluate_step")


def convert(
    checkpoint: Path,
    output: Path,
    dtype: str | None = None,
    *,
    average: bool = False,
    license_name: str | None = None,
) -> Iterator[str]:
    """Write the standalone model of a checkpoint into `output`, which is complete or absent; yields lines to show.

    `dtype` is one of DTYPES, or None for the precision that the run trained in; "int8" is of tables and LM head, with
    a float32 scale a row, and makes the rest bfloat16. With `average` the weights are the average that the run kept.
    `license_name` is the hub's identifier of the weights' licence, for the card.
    What was written is read again and compared with the checkpoint and with what the trainer recorded in it (see
    `prove`).

    Raises UserError for a checkpoint or an output that cannot be used, TrainingError where the written model does not
    compute what the trainer did, OSError where writing fails. None of them leaves anything at `output`.
    """
    started = time.perf_counter()
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {dtype!r}: it must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if license_name is not None:
        check_license(license_name)
    output = Path(os.path.abspath(output))
    check_output(output)
    reader, config = open_checkpoint(checkpoint, average=average)
    dtype = dtype or config.training.precision
    yield _describe_source(reader, config)

    with new_folder(output, last=MODEL_CONFIG) as folder:
        proof = _write_folder(reader, config, dtype, folder, license_name)
    yield from _describe_result(reader, config, output, dtype, proof, time.perf_counter() - started)


def open_checkpoint(path: Path, *, average: bool = False) -> tuple[CheckpointReader, Config]:
    """A checkpoint, its `latest` file or its run's folder, and its last step's configuration; `average`: that of its
    weights is what is read. Raises UserError.
    """
    reader = CheckpointReader(resolve_checkpoint(path), weights=AVERAGE if average else "master")
    if reader.weights not in reader.manifest.kinds:
        raise UserError(
            f"{reader.checkpoint}: holds no average of the weights: leave --average out, or train with "
            "training.average_decay"
        )
    reader.read_file(CONFIG)  # its checksum
    step = reader.manifest.step
    config = phase_at(load_config(reader.checkpoint / CONFIG), step).config
    config = replace(config, model=config.model.after(step))
    check_layers(config.model, len(reader.shapes), reader.checkpoint / CONFIG)
    with torch.device("meta"):
        model = MemoryFormer(config.model)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted({*expected, *reader.shapes}):
        if expected.get(name) != reader.shapes.get(name):
            raise UserError(
                f"{reader.checkpoint}: damaged: {name} is {reader.shapes.get(name)} in its manifest and "
                f"{expected.get(name)} by its config.yaml; use another checkpoint"
            )
    return reader, config


def phases_until(reader: CheckpointReader) -> list[Phase]:
    """The run's phases up to the checkpoint's step."""
    phases = phases_of(load_config(reader.checkpoint / CONFIG))
    return [phase for phase in phases if phase.first <= max(1, reader.manifest.step)]


def text_files(reader: CheckpointReader, config: Config, dtype: str) -> dict[str, bytes]:
    """Contents by name of all files that do not depend on the weights: settings, tokenizer and source files."""
    end_of_text_id, texts = config.tokenizer.end_of_text_id, {}
    files = reader.read_tokenizer()  # and their checksums
    if not files and end_of_text_id is None:
        reader.read_file(TOKENIZER)  # which says that it is missing
    if files:
        tokenizer = tokenizer_in(reader.checkpoint, end_of_text_id)
        end_of_text_id = tokenizer.end_of_text_id
        texts = tokenizer_files(tokenizer, config.model.sequence_length)
    assert end_of_text_id is not None
    return texts | settings_files(config, dtype, end_of_text_id) | source_files()


def source_tree(reader: CheckpointReader, config: Config) -> dict[str, Any]:
    """The certificate's entries about the checkpoint."""
    state = reader.state()
    metrics = state.get("metrics") or {}
    if reader.weights == AVERAGE:
        metrics = {}  # they are of other weights
    return {
        "checkpoint": reader.checkpoint.name,
        "step": reader.manifest.step,
        "tokens": state["tokens"],
        "precision": config.training.precision,
        "device": state["device"],
        "tensor_parallel": reader.manifest.tensor_parallel,
        "metrics": {name: metrics[name] for name in _METRICS if name in metrics},
    } | ({"weights": AVERAGE} if reader.weights == AVERAGE else {})


def _write_folder(
    reader: CheckpointReader, config: Config, dtype: str, folder: Path, license_name: str | None
) -> Proof:
    """Everything, in order; the certificate last."""
    for name, content in text_files(reader, config, dtype).items():
        (folder / name).write_bytes(content)
    digests = copy_weights(reader, folder, getattr(torch, dtype))
    source = source_tree(reader, config)
    proof = prove(reader, config, source["device"], dtype, folder)
    tree = certificate_tree(source, dtype, proof)
    if license_name is not None:
        tree[LICENSE] = license_name
    (folder / CARD).write_bytes(model_card(phases_until(reader), tree))
    tree |= {"tensors": digests, "files": dict(hash_files(folder))}
    (folder / CERTIFICATE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return proof


def check_output(output: Path) -> None:
    """Raises UserError where something is there already that is not an empty folder."""
    if output.is_dir() and {path.name for path in output.iterdir()} <= {_PARTIAL}:
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; choose another output folder or delete it")


@contextmanager
def new_folder(output: Path, last: str) -> Iterator[Path]:
    """A folder for the block to write, which becomes `output` when the block ends well, and is deleted otherwise.

    Where `output` is there already, a mount point or a link too, the files are written inside it and moved to their
    place at the end: `last`, without which nothing loads, after all others.
    """
    there = output.is_dir()
    partial = output / _PARTIAL if there else output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.iterdir(), partial):
            sync(path)
        if there:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
                os.rename(path, output / path.name)
            partial.rmdir()
            sync(output)
        else:
            os.rename(partial, output)
            sync(output.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _describe_source(reader: CheckpointReader, config: Config) -> str:
    counts = count_parameters(config.model)
    which = "the average of the weights of a " if reader.weights == AVERAGE else ""
    return (
        f"read {reader.checkpoint}: {which}{config.model.description} of {counts.total / 1e6:.1f} M parameters "
        f"after step {reader.manifest.step}, trained in {config.training.precision}, tensor-parallel "
        f"{reader.manifest.tensor_parallel}"
    )


def _describe_result(
    reader: CheckpointReader, config: Config, output: Path, dtype: str, proof: Proof, seconds: float
) -> Iterator[str]:
    size = sum(path.stat().st_size for path in output.iterdir())
    shown = os.path.relpath(output) if output.is_relative_to(Path.cwd()) else str(output)
    written = "int8 (tables and LM head) and bfloat16" if dtype == INT8 else dtype
    yield f"wrote {shown}: {len(reader.shapes)} tensors in {written}, {human_bytes(size)} in all, {seconds:.1f} s"
    yield from describe_proof(proof, dtype, reader.weights)
    if dtype != config.training.precision:
        yield f"loss on text: memoryformer evaluate {shlex.quote(shown)} --data GLOB"
    if not reader.read_tokenizer():
        yield f"no tokenizer: the run had only token ids; copy that of its token shards into {shlex.quote(shown)}"
        return
    yield f"try: memoryformer generate {shlex.quote(shown)} 'Once upon a time'"


def describe_proof(proof: Proof, dtype: str, weights: str) -> Iterator[str]:
    """Lines that show it. `weights`: the reader's."""
    probe, before = proof.probe, "the checkpoint's average" if weights == AVERAGE else "the trainer"
    text = "tokens of validation text" if proof.text == "validation" else "random tokens"
    yield (
        f"certificate: on {len(proof.tokens)} {text} the largest logit difference from {before} is "
        f"{probe.largest_logit_difference:.3g}, and {probe.changed} of {probe.codes} codes changed"
    )
    if proof.replay.changed:
        worst = max(proof.replay.changed_codes.values())
        yield (
            f"layer by layer the checkpoint's weights here and in the trainer differ in {proof.replay.changed} codes, "
            f"at most {worst:.2%} of a layer's: another processor rounds otherwise"
        )
    if dtype != proof.precision:
        yield (
            f"loss on {len(proof.tokens) - 1} of these {proof.text} tokens: {probe.loss:.4f} nats, "
            f"{probe.loss_difference:+.4f} against {before}; predictions diverge by {probe.divergence:.2g} nats"
        )
