"""Runs text through a model and counts the reads of every row of every table."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mf_train.data.stream.validation import validation_tokens
from mf_train.errors import UserError
from mf_train.files import write_whole
from mf_train.inspection.figure import draw_reads
from mf_train.inspection.source import Inspected, open_inspected
from mf_train.inspection.terminal import reads_lines
from mf_train.model.attention.masks import document_numbers
from mf_train.standalone.conversion.streamed_model import streamed_model
from mf_train.telemetry.alarms import alarming
from mf_train.telemetry.counts import ReadCounts
from mf_train.telemetry.statistics import HashStatistics, table_numbers

PICTURE, NUMBERS = "buckets.png", "tables.json"
_READS_A_ROW = 32  # of the largest tables, that as many sequences hold as are read unless told otherwise


@dataclass(frozen=True)
class Reads:
    """What was counted: int64 [K, 2**tau] of each hash, by its name, and the numbers of its tables."""

    tokens: int
    sequences: int
    counts: dict[str, Tensor]
    hashes: list[HashStatistics]


def inspect(
    path: Path, data: Sequence[str], sequences: int | None, output: Path | None, as_json: bool
) -> Iterator[str]:
    """Yield the lines that `memoryformer inspect` shows, and write PICTURE and NUMBERS into `output` where it is given.

    Raises UserError or OSError.
    """
    if sequences is not None and sequences < 1:
        raise UserError(f"--sequences is {sequences}: it must be at least 1")
    if output is not None and output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: not a folder; give a folder, which may be new")
    inspected = open_inspected(path, data)
    reads = count_reads(inspected, sequences)
    tree = describe(inspected, reads)
    if output is not None:
        picture = draw_reads(reads.counts, reads.hashes)
        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / PICTURE, picture)
        write_whole(output / NUMBERS, (json.dumps(tree, indent=1) + "\n").encode())
    if as_json:
        yield json.dumps(tree)
        return
    yield f"{inspected.name}: {reads.tokens:,} tokens in {reads.sequences} sequences"
    yield from reads_lines(reads.counts, reads.hashes, inspected.limits)
    if output is not None:
        yield f"{output / PICTURE}, {output / NUMBERS}"


@torch.no_grad()
def count_reads(inspected: Inspected, sequences: int | None) -> Reads:
    """A sequence at a time through the model: memory grows neither with the model nor, but for its ids, the text."""
    config = inspected.config
    length = config.sequence_length
    wanted = sequences or -(-_READS_A_ROW * 2**config.inner_bits // length)
    try:
        tokens_t = validation_tokens(
            inspected.sources, inspected.data, inspected.tokenizer, length, wanted, key=inspected.key
        )
    except UserError as error:
        hint = "" if inspected.key == "--data" else "; or give other text with --data GLOB"
        raise UserError(f"{error}{hint}") from None
    if tokens_t.max() >= config.vocab_size:
        raise UserError(
            f"{inspected.name}: the text has token {tokens_t.max()}, and the model knows {config.vocab_size}: give "
            "text, or shards of the model's own tokenizer"
        )
    tokens_t = tokens_t[:-1]  # the last is only a target
    model = streamed_model(config, inspected.weights)
    counts = ReadCounts(model, config.num_tables, torch.device("cpu"))
    starts = range(0, len(tokens_t), length)
    for start in starts:
        rows = torch.from_numpy(tokens_t[start : start + length].astype(np.int64)).unsqueeze(0)
        documents = (
            document_numbers(rows, inspected.tokenizer.end_of_text_id) if inspected.documents else None
        )
        with counts.counting():
            model(rows, documents_bs=documents, logits_to_keep=1)
    hashes = [HashStatistics(name, table_numbers(value)) for name, value in counts.by_hash.items()]
    return Reads(len(tokens_t), len(starts), counts.by_hash, hashes)


def describe(inspected: Inspected, reads: Reads) -> dict[str, Any]:
    """What NUMBERS and --json hold: each hash's summary as in metrics.jsonl, and of each table what a summary hides."""
    limits, tables = inspected.limits, {}
    for one in reads.hashes:
        beyond = torch.stack(list(alarming(one, limits).values())).any(0)
        tables[one.name] = (
            one.summary()
            | {"alarming_tables": int(beyond.sum())}
            | {"each_table": {name: values.tolist() for name, values in one.columns().items()}}
        )
    return {
        "model": inspected.name,
        "data": [source.path or source.hub for source in inspected.sources],
        "sequences": reads.sequences,
        "tokens": reads.tokens,
        "tables": tables,
    }
