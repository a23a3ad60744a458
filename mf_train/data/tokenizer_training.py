"""Training a tokenizer on documents: which of them, in what pieces, and what is written beside the model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.documents import TextDocuments, segments_of
from mf_train.data.sources import open_text
from mf_train.data.stream.order import EpochOrder
from mf_train.data.tokenizer import (
    LARGEST_VOCABULARY,
    SMALLEST_VOCABULARY,
    SPACE_MARK,
    load_processor,
    train_model,
)
from mf_train.errors import UserError
from mf_train.files import write_whole

_UNKNOWN_MARK = "\u2585"  # sentencepiece drops training sentences that hold it
_TRAINING_SEGMENT_BYTES = 4096
_FERTILITY_BYTES = 1_000_000


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    output_dir: str | Path,
    *,
    text_field: str = "text",
    max_bytes: int = 256_000_000,
    cache: str | None = None,
) -> Path:
    """Train a lossless byte-fallback BPE model on documents; writes and returns `output_dir/tokenizer.model`.

    `inputs` are files, folders, globs or URLs of the formats of training sources. When they hold more than
    `max_bytes` of text, documents are drawn in a fixed pseudo-random order up to that size; `tokenizer_info.json`
    beside the model says how much was read, and the tokens that a byte of each input makes ("fertility").
    The same inputs and versions give the same bytes. Raises UserError when the inputs cannot be read or do not
    support the vocabulary size.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"--vocab-size {vocab_size}: bytes and special ids alone need {SMALLEST_VOCABULARY} or more"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: it must be at most {LARGEST_VOCABULARY}: ids are int32")
    sources = [
        open_text(SourceConfig(path=i, text_field=text_field), "--input", DataConfig(cache=cache))
        for i in inputs
    ]
    used = {"documents": 0, "bytes": 0}
    try:
        model = train_model(
            _training_segments(sources, max_bytes, used), vocab_size, 4 * _TRAINING_SEGMENT_BYTES
        )
    except RuntimeError as error:
        raise _training_error(error, vocab_size, inputs) from error
    trained = load_processor(model, Path(output_dir))
    info = {
        "vocab_size": vocab_size,
        "inputs": list(inputs),
        "documents": used["documents"],
        "bytes": used["bytes"],
        "tokens_per_byte": [round(_fertility(trained, source), 4) for source in sources],
        "sentencepiece": version("sentencepiece"),
    }
    return _write_model(Path(output_dir), model, info)


def _training_segments(sources: list[TextDocuments], max_bytes: int, used: dict[str, int]) -> Iterator[str]:
    """Short segments of the documents: sentencepiece skips what is longer than max_sentence_length."""
    total = sum(source.num_bytes for source in sources)
    for index, source in enumerate(sources):
        budget = source.num_bytes if total <= max_bytes else source.num_bytes * max_bytes // total
        order = EpochOrder(seed=0, source=index, size=len(source))
        for number in range(len(source)):
            if budget <= 0:
                break
            document = number if total <= max_bytes else order[number]
            size = source.length(document)
            budget -= size
            used["documents"] += 1
            used["bytes"] += size
            for segment in segments_of(source, document, _TRAINING_SEGMENT_BYTES):
                for mark in (SPACE_MARK, _UNKNOWN_MARK):
                    segment = segment.replace(mark, "")
                yield segment


def _fertility(processor: Any, source: TextDocuments) -> float:
    """Tokens a byte of text, over the source's first megabyte."""
    tokens = size = 0
    for segment in itertools.chain.from_iterable(segments_of(source, i) for i in range(len(source))):
        tokens += len(processor.encode(segment))
        size += len(segment.encode("utf-8"))
        if size >= _FERTILITY_BYTES:
            break
    return tokens / size


def _training_error(error: RuntimeError, vocab_size: int, inputs: Sequence[str]) -> Exception:
    """What sentencepiece says of the text, for the user; an error of another kind as it is."""
    message = " ".join(str(error).split())
    if too_high := re.search(r"value <= (\d+)", message):
        return UserError(
            f"--vocab-size {vocab_size}: this text supports {too_high[1]} at most; give more text or less"
        )
    if too_low := re.search(r"required_chars\. (\d+) vs (\d+)", message):
        return UserError(f"--vocab-size {vocab_size}: the characters of this text need {too_low[2]} or more")
    if "!sentences_.empty()" in message or "(all_chars_count) > (0)" in message:
        return UserError(
            f"--input {', '.join(inputs)}: no text to train on: line ends, NUL, U+2581 and U+2585 do not count; name "
            "files with words"
        )
    return error


def _write_model(output_dir: Path, proto: bytes, info: dict[str, Any]) -> Path:
    """Both files, each complete or absent, the model last."""
    info_bytes = (json.dumps(info, indent=2) + "\n").encode("utf-8")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer_info.json", info_bytes), ("tokenizer.model", proto)):
            write_whole(output_dir / name, content)
    except OSError as error:
        raise UserError(f"--output {output_dir}: cannot be written ({error.strerror})") from None
    return output_dir / "tokenizer.model"
