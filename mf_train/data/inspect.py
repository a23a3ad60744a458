"""What `memoryformer data inspect` shows: the sources, and the batch of a step with its digest."""

from __future__ import annotations

import time

from mf_train.config import Config, SourceConfig
from mf_train.data.digest import batch_digest
from mf_train.data.sources import Documents, open_source
from mf_train.data.stream import Tokens, TokenStream
from mf_train.data.tokenizer import END_OF_TEXT, Tokenizer, check_vocabulary
from mf_train.errors import UserError

_SHOWN_CHARACTERS = 200
_SLOW_SECONDS = 2.0


def inspect_data(config: Config, step: int = 1) -> list[str]:
    """Lines of text: tokenizer, sources, and the global batch of a step with its digest.

    Steps count from 1, as in metrics.jsonl.
    The batches before `step` are made, too, to get there; the last line says so where it took long.
    Raises UserError as TokenStream and Tokenizer do, and for a step below 1.
    """
    if step < 1:
        raise UserError(f"--step {step}: the first step is 1")
    tokenizer = Tokenizer(config.tokenizer.path)
    check_vocabulary(tokenizer, config.model.vocab_size)
    stream = TokenStream(
        config.data, tokenizer, config.model.sequence_length, config.training.global_batch_size
    )
    lines = [
        f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} ids, end of text {tokenizer.end_of_text_id}"
    ]
    total = sum(source.weight for source in config.data.train)
    for index, (source, documents) in enumerate(zip(config.data.train, stream.sources, strict=True)):
        share = f"weight {source.weight:g} ({source.weight / total:.1%} of the rows)"
        lines += _describe(f"train[{index}]", source, documents, share)
    for index, source in enumerate(config.data.validation):
        documents = open_source(source, f"data.validation[{index}]")
        lines += _describe(f"validation[{index}]", source, documents, "")
    started = time.monotonic()
    for _ in range(step - 1):
        stream.next_batch()
    lines += _describe_batch(stream.next_batch(), tokenizer, step)
    seconds = time.monotonic() - started
    if seconds > _SLOW_SECONDS:
        lines.append(f"(making the {step - 1} batches before it took {seconds:.0f} s)")
    return lines


def _describe(label: str, source: SourceConfig, documents: Documents, share: str) -> list[str]:
    files = f"{len(documents.files)} files" if documents.files else f"hub, split {source.split}"
    counts = [files, f"{len(documents):,} documents", f"{documents.num_bytes:,} bytes", share]
    first = documents[0]
    shown = first[:_SHOWN_CHARACTERS] + ("..." if len(first) > _SHOWN_CHARACTERS else "")
    return [
        f"{label} {documents.name}: {', '.join(part for part in counts if part)}",
        f"  first document: {shown!r}",
    ]


def _describe_batch(batch: Tokens, tokenizer: Tokenizer, step: int) -> list[str]:
    rows, width = batch.shape
    size = f"{rows} rows of {width} tokens ({width - 1} predicted)"
    return [
        f"batch of step {step}: {size}, digest {batch_digest(batch)}",
        f"  row 0: {decode_row(batch[0], tokenizer)!r}",
    ]


def decode_row(tokens_s: Tokens, tokenizer: Tokenizer) -> str:
    """Text of a row with its ends of text written out."""
    pieces: list[list[int]] = [[]]
    for token in tokens_s.tolist():
        if token == tokenizer.end_of_text_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return END_OF_TEXT.join(tokenizer.decode(piece) for piece in pieces)
