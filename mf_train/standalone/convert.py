"""`memoryformer convert`: a training checkpoint of any degrees becomes a folder that transformers loads."""

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mf_train.checkpoint.layout import CONFIG, PROBE, TOKENIZER, resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config
from mf_train.config.loading import load_config
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.model.counts import count_parameters
from mf_train.model.model import MemoryFormer
from mf_train.standalone.certificate import Comparison, check, compare, read_probe, write_certificate
from mf_train.standalone.names import INT8
from mf_train.standalone.settings_files import settings_files
from mf_train.standalone.source_files import source_files
from mf_train.standalone.tokenizer_files import tokenizer_files
from mf_train.standalone.weights import copy_weights

DTYPES = ("float32", "bfloat16", INT8)


def convert(checkpoint: Path, output: Path, dtype: str | None = None) -> Iterator[str]:
    """Write the standalone model of a checkpoint into `output`, which is complete or absent; yields lines to show.

    `dtype` is one of DTYPES, or None for the precision that the run trained in; "int8" is of tables and LM head, with
    a float32 scale a row, and makes the rest bfloat16. The written model is loaded again and compared with what the
    trainer recorded in the checkpoint.

    Raises UserError for a checkpoint or an output that cannot be used, TrainingError where the written model does not
    compute what the trainer did, OSError where writing fails. None of them leaves anything at `output`.
    """
    started = time.perf_counter()
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype is {dtype!r}: it must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    output = Path(os.path.abspath(output))
    _check_output(output)
    reader = CheckpointReader(resolve_checkpoint(checkpoint))
    config = load_config(reader.checkpoint / CONFIG)
    _check_model(reader, config)
    dtype = dtype or config.training.precision
    yield _describe_source(reader, config)

    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        comparison = _write_folder(reader, config, dtype, partial)
        os.rename(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    yield from _describe_result(reader, config, output, dtype, comparison, time.perf_counter() - started)


def _write_folder(reader: CheckpointReader, config: Config, dtype: str, folder: Path) -> Comparison:
    """Everything, in order; the certificate last."""
    source, state = reader.checkpoint, reader.state()
    end_of_text_id, texts = config.tokenizer.end_of_text_id, {}
    if end_of_text_id is None:
        end_of_text_id = Tokenizer(source / TOKENIZER).end_of_text_id
        texts = tokenizer_files(source / TOKENIZER, config.model.sequence_length)
    texts |= settings_files(config, dtype, end_of_text_id, state)
    texts |= source_files()
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    digests = copy_weights(reader, folder, getattr(torch, dtype))
    comparison = compare(folder, read_probe(source / PROBE))
    # on another kind of processor a value that rounds across zero may change a code, and no conversion is to blame
    exact = dtype == config.training.precision == "float32" and state["device"] == "cpu"
    check(comparison, exact=exact)
    origin = {
        "checkpoint": source.name,
        "step": reader.manifest.step,
        "tokens": state["tokens"],
        "precision": config.training.precision,
        "device": state["device"],
        "tensor_parallel": reader.manifest.tensor_parallel,
    }
    write_certificate(folder, origin, dtype, digests, comparison)
    for path in folder.iterdir():
        _sync(path)
    return comparison


def _check_output(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UserError(f"{output}: exists already; choose another output folder or delete it")


def _check_model(reader: CheckpointReader, config: Config) -> None:
    """The tensors are those of the configuration beside them."""
    with torch.device("meta"):
        model = MemoryFormer(config.model)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted({*expected, *reader.shapes}):
        if expected.get(name) != reader.shapes.get(name):
            raise UserError(
                f"{reader.checkpoint}: damaged: {name} is {reader.shapes.get(name)} in its manifest and "
                f"{expected.get(name)} by its config.yaml; use another checkpoint"
            )


def _describe_source(reader: CheckpointReader, config: Config) -> str:
    counts = count_parameters(config.model)
    return (
        f"read {reader.checkpoint}: {config.model.kind} of {counts.total / 1e6:.1f} M parameters after step "
        f"{reader.manifest.step}, trained in {config.training.precision}, tensor-parallel "
        f"{reader.manifest.tensor_parallel}"
    )


def _describe_result(
    reader: CheckpointReader, config: Config, output: Path, dtype: str, comparison: Comparison, seconds: float
) -> Iterator[str]:
    size = sum(path.stat().st_size for path in output.iterdir())
    shown = os.path.relpath(output) if output.is_relative_to(Path.cwd()) else str(output)
    written = "int8 (tables and LM head) and bfloat16" if dtype == INT8 else dtype
    yield f"wrote {shown}: {len(reader.shapes)} tensors in {written}, {size / 1e6:.1f} MB in all, {seconds:.1f} s"
    yield (
        f"certificate: on {len(comparison.tokens)} tokens the largest logit difference from the trainer is "
        f"{comparison.largest_logit_difference:.3g}, and {comparison.changed} of {comparison.codes} codes changed"
    )
    if dtype != config.training.precision:
        yield (
            f"loss on {len(comparison.tokens) - 1} of these random tokens: {comparison.loss:.4f} nats, "
            f"{comparison.loss_difference:+.4f} against the trainer; predictions diverge by "
            f"{comparison.divergence:.2g} nats"
        )
        yield f"loss on text: memoryformer evaluate {shlex.quote(shown)} --data GLOB"
    if config.tokenizer.end_of_text_id is not None:
        yield f"no tokenizer: the run had only token ids; copy that of its token shards into {shlex.quote(shown)}"
        return
    yield f"try: memoryformer generate {shlex.quote(shown)} 'Once upon a time'"


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
