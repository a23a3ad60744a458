"""The token stream, slow and direct: an independent reference."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from fractions import Fraction

import numpy as np

from mf_train.config import DataConfig
from mf_train.data.stream.order import EpochOrder
from mf_train.data.tokenizer import Tokenizer


def reference_batches(
    data: DataConfig, texts: list[list[str]], tokenizer: Tokenizer, sequence_length: int, batch: int
) -> Iterator[np.ndarray]:
    """Slow and direct: whole documents, exact arithmetic, no segments, no state, the order spelled out."""
    streams = data.logical_streams
    total = sum(Fraction(str(source.weight)) for source in data.train)
    shares = [Fraction(str(source.weight)) / total for source in data.train]
    sequence: list[int] = []  # the mixture's
    taken = [0] * len(shares)

    def source_of(element: int) -> int:
        while len(sequence) <= element:
            deficits = [
                share * (len(sequence) + 1) - count for share, count in zip(shares, taken, strict=True)
            ]
            sequence.append(deficits.index(max(deficits)))
            taken[sequence[-1]] += 1
        return sequence[element]

    full = [[text for text in documents if text] for documents in texts]
    held: dict[tuple[int, int], list[int]] = {}
    readers = {
        (stream, source): reference_documents(data, source, stream, full[source])
        for stream in range(streams)
        for source in range(len(full))
    }
    sample = 0
    while True:
        rows = []
        for _ in range(batch):
            stream, row = sample % streams, sample // streams
            key = (stream, source_of(stream + row))
            tokens = held.setdefault(key, [])
            while len(tokens) < sequence_length + 1:
                tokens += [*tokenizer.encode(next(readers[key])), tokenizer.end_of_text_id]
            rows.append(tokens[: sequence_length + 1])
            del tokens[:sequence_length]
            sample += 1
        yield np.array(rows, np.int32)


def reference_documents(data: DataConfig, source: int, stream: int, documents: list[str]) -> Iterator[str]:
    """A stream's documents of a source: windows of blocks, as order.py's docstrings define them."""
    streams, count = data.logical_streams, len(documents)
    block_size = min(data.block_documents, max(1, count // (16 * streams)))
    blocks = [documents[i : i + block_size] for i in range(0, count, block_size)]
    window_size = min(data.window_blocks, max(1, len(blocks) // streams))
    order = EpochOrder(seed=data.seed, source=source, size=len(blocks))
    element = 0
    for window in itertools.count():
        held = []
        for _ in range(window_size):
            held += blocks[order[stream + element * streams]]
            element += 1
        name = f"window order {data.seed} {source} {stream} {window}"
        digest = hashlib.shake_128(name.encode()).digest(8 * len(held))
        keys = [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(len(held))]
        yield from (held[i] for i in sorted(range(len(held)), key=keys.__getitem__))
