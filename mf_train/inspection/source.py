"""What is inspected: a run's newest checkpoint, a checkpoint, or a converted model, with the text it is read on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mf_train.config import DataConfig, LoggingConfig, ModelConfig, SourceConfig
from mf_train.data.open_tokenizer import open_tokenizer, tokenizer_in
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.standalone.conversion.convert import open_checkpoint
from mf_train.standalone.conversion.streamed_model import CheckpointWeights, FolderWeights, Weights
from mf_train.standalone.exported.names import DOCUMENT_ATTENTION
from mf_train.standalone.folder import CONFIG


@dataclass(frozen=True)
class Inspected:
    """A model with its weights left in files, and how to read text for it."""

    name: str
    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    sources: Sequence[SourceConfig]
    key: str  # what names the sources in errors
    data: DataConfig
    documents: bool  # attention inside documents only
    limits: LoggingConfig  # beyond which a table is alarming: the run's


def open_inspected(path: Path, data: Sequence[str]) -> Inspected:
    """`data` are globs of text; none: the run's own validation text. Raises UserError or OSError."""
    given = [SourceConfig(path=glob) for glob in data]
    found = _open_model(path, given) if (path / CONFIG).is_file() else _open_checkpoint(path, given)
    if "memory" not in found.config.layer_kinds:
        raise UserError(
            f"{found.name}: a model without memory layers, whose reads are counted; give a MemoryFormer's folder"
        )
    return found


def _open_model(folder: Path, given: list[SourceConfig]) -> Inspected:
    weights = FolderWeights(folder)
    if not given:
        raise UserError(f"{folder}: a converted model knows no text: add --data GLOB, such as held-out text")
    tree = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return Inspected(
        name=str(folder),
        config=weights.config,
        weights=weights,
        tokenizer=tokenizer_in(folder),
        sources=given,
        key="--data",
        data=DataConfig(),
        documents=bool(tree.get(DOCUMENT_ATTENTION)),
        limits=LoggingConfig(),
    )


def _open_checkpoint(path: Path, given: list[SourceConfig]) -> Inspected:
    if not path.exists():
        raise UserError(f"{path}: no such folder; give a run's folder, a checkpoint or a converted model")
    reader, config = open_checkpoint(path)
    sources = given or list(config.data.validation)
    if not sources:
        raise UserError(f"{reader.checkpoint}: its run had no data.validation: add --data GLOB")
    if reader.read_tokenizer():  # and their checksums
        tokenizer = tokenizer_in(reader.checkpoint, config.tokenizer.end_of_text_id)
    else:
        tokenizer = open_tokenizer(config.tokenizer, config.model.vocab_size)
    return Inspected(
        name=str(reader.checkpoint),
        config=config.model,
        weights=CheckpointWeights(reader, config.training.precision),
        tokenizer=tokenizer,
        sources=sources,
        key="--data" if given else "data.validation",
        data=config.data,
        documents=config.data.document_attention,
        limits=config.logging,
    )
