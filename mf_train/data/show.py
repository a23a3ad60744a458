"""What `memoryformer data inspect` shows: the sources, and the batch of a step with its digest."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from mf_train.config import Config, SourceConfig
from mf_train.config.phases import Phase, phase_at, phases_of
from mf_train.data.documents import Source, Tokens
from mf_train.data.open_tokenizer import open_tokenizer
from mf_train.data.sources import open_source
from mf_train.data.stream.digest import batch_digest
from mf_train.data.stream.stream import State, TokenStream
from mf_train.data.tokenizer import END_OF_TEXT, Tokenizer
from mf_train.errors import UserError

_SHOWN_CHARACTERS = 200
_SHOWN_DOCUMENTS = 2
_SHOWN_ROWS = 8
_SAMPLE_DOCUMENTS = 256  # that say how many bytes a token has
_SAMPLE_TOKENS = 8192  # of each at least, where it has so many
_SLOW_SECONDS = 2.0


def inspect_data(config: Config, step: int = 1, saved: tuple[int, State] | None = None) -> Iterator[str]:
    """Lines of text: tokenizer, sources, and the global batch of a step with its digest.

    Steps count from 1, as in metrics.jsonl; sources are those of the step's phase. The batches before it are made, too,
    to get there, from `saved` on if that is an earlier step and the state after it of this run's stream; the last line
    says so where it took long.
    Raises UserError as TokenStream and Tokenizer do, and for a step below 1.
    """
    if step < 1:
        raise UserError(f"--step {step}: the first step is 1")
    tokenizer = open_tokenizer(config.tokenizer, config.model.vocab_size)
    phase = phase_at(config, step)
    data, stream = phase.config.data, _open_stream(phase, tokenizer)
    if config.phases:
        yield f"phase {phase.name!r}: steps {phase.first} to {phase.last}"
    yield f"tokenizer {tokenizer.path}: {tokenizer.vocab_size} ids, end of text {tokenizer.end_of_text_id}"
    total = sum(source.weight for source in data.train)
    for index, (settings, source) in enumerate(zip(data.train, stream.sources, strict=True)):
        share = f"weight {settings.weight:g} ({settings.weight / total:.1%} of the rows)"
        yield from _describe(f"train[{index}]", settings, source, tokenizer, share)
    for index, settings in enumerate(data.validation):
        source = open_source(settings, f"data.validation[{index}]", data, tokenizer)
        yield from _describe(f"validation[{index}]", settings, source, tokenizer, "")
    started = time.monotonic()
    first = _advance(stream, config, step, tokenizer, saved)
    yield from _describe_batch(stream, tokenizer, step)
    seconds = time.monotonic() - started
    if seconds > _SLOW_SECONDS:
        yield f"(making the batches of steps {first} to {step - 1} before it took {seconds:.0f} s)"


def _open_stream(phase: Phase, tokenizer: Tokenizer) -> TokenStream:
    config = phase.config
    return TokenStream(
        config.data, tokenizer, config.model.sequence_length, config.training.global_batch_size
    )


def _advance(
    stream: TokenStream, config: Config, step: int, tokenizer: Tokenizer, saved: tuple[int, State] | None
) -> int:
    """Bring a new stream of the step's phase before its batch, through earlier phases if need be.

    Returns the first step whose batch was made.
    """
    target = phase_at(config, step)
    done, state = saved or (0, None)
    if state is not None:
        before = phase_at(config, done)
        of = stream if before == target else _open_stream(before, tokenizer)
        if state["identity"] != of.identity() or state["step"] != done - before.first + 1:
            done, state = 0, None  # of another run
    first = done + 1
    for phase in phases_of(config):
        if phase.first > step or (phase.last <= done and phase != target):
            continue
        here = stream if phase == target else _open_stream(phase, tokenizer)
        if state is not None and done < phase.first:
            here.follow(state)
        elif state is not None:
            here.load_state_dict(state)
        done = step - 1 if phase == target else phase.last
        while here.step < done - phase.first + 1:
            here.next_batch()
        state = here.state_dict()
    return first


def _describe(
    label: str, settings: SourceConfig, source: Source, tokenizer: Tokenizer, share: str
) -> Iterator[str]:
    files = f"{source.num_files} files" if source.num_files else f"hub, split {settings.split}"
    skipped = f"{sum(source.skipped.values()):,} left out" if source.skipped else ""
    counts = [files, f"{source.num_documents:,} documents", skipped, *_sizes(source, tokenizer), share]
    yield f"{label} {source.name}: {', '.join(part for part in counts if part)}"
    for file, count in list(source.skipped.items())[:_SHOWN_ROWS]:
        yield f"  {file}: {count:,} documents left out"
    if source.left_out:
        yield f"  {len(source.left_out):,} files of formats that are not read: {_some(source.left_out)}"
    for document in range(min(_SHOWN_DOCUMENTS, source.num_documents)):
        tokens = source.read([document], 0, _SHOWN_CHARACTERS).tokens
        yield f"  document {document}: {_shorten(decode_row(tokens, tokenizer))}"


def _sizes(source: Source, tokenizer: Tokenizer) -> list[str]:
    """Bytes and tokens, those that nobody counted estimated from the bytes a token of a sample."""
    tokens, size, documents = _sample(source, tokenizer)
    if not size:  # nothing is known of the text
        return [f"{source.num_tokens:,} tokens" if source.num_tokens is not None else "token ids only"]
    ratio = size / tokens
    num_bytes, num_tokens = source.num_bytes, source.num_tokens
    if num_bytes is not None:
        shown = [f"{num_bytes:,} bytes"]
        shown.append(
            f"{num_tokens:,} tokens" if num_tokens is not None else f"about {num_bytes / ratio:,.0f} tokens"
        )
    else:
        shown = [f"{num_tokens:,} tokens"] if num_tokens is not None else []
    return [*shown, f"{ratio:.2f} bytes a token, {1 / ratio:.3f} tokens a byte (of {documents} documents)"]


def _sample(source: Source, tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Tokens at the beginning of documents evenly spread, ends of text not counted; their bytes; how many documents."""
    count = min(source.num_documents, _SAMPLE_DOCUMENTS)
    tokens = size = 0
    for sample in range(count):
        start = 0
        read = 0
        while read < _SAMPLE_TOKENS:
            chunk = source.read(
                [sample * (source.num_documents - 1) // max(1, count - 1)], start, _SAMPLE_TOKENS
            )
            read += len(chunk.tokens)
            tokens += int((chunk.tokens != tokenizer.end_of_text_id).sum())
            size += int(tokenizer.token_bytes[chunk.tokens].sum(dtype=np.int64))
            passed, start = chunk.end
            if passed:
                break
    return tokens, size, count


def _describe_batch(stream: TokenStream, tokenizer: Tokenizer, step: int) -> Iterator[str]:
    rows = [stream.next_row() for _ in stream.row_numbers()]
    batch = np.stack([row.tokens for row in rows])
    size = f"{len(rows)} rows of {batch.shape[1]} tokens ({batch.shape[1] - 1} predicted)"
    yield f"batch of step {step}: {size}, digest {batch_digest(batch)}"
    for number, row in enumerate(rows[:_SHOWN_ROWS]):
        yield f"  row {number}, train[{row.source}]: {_shorten(decode_row(row.tokens, tokenizer))}"
    if len(rows) > _SHOWN_ROWS:
        yield f"  ... and {len(rows) - _SHOWN_ROWS} more rows"


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _SHOWN_ROWS:,} more"] if len(names) > _SHOWN_ROWS else []
    return ", ".join([*names[:_SHOWN_ROWS], *more])


def _shorten(text: str) -> str:
    return repr(text[:_SHOWN_CHARACTERS] + ("..." if len(text) > _SHOWN_CHARACTERS else ""))


def decode_row(tokens_s: Tokens, tokenizer: Tokenizer) -> str:
    """Text of a row with its ends of text written out."""
    pieces: list[list[int]] = [[]]
    for token in tokens_s.tolist():
        if token == tokenizer.end_of_text_id:
            pieces.append([])
        else:
            pieces[-1].append(token)
    return END_OF_TEXT.join(tokenizer.decode(piece) for piece in pieces)
