"""`memoryformer evaluate`: loss of a standalone model on the blocks that the trainer validates on."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.open_tokenizer import tokenizer_in
from mf_train.data.stream.validation import ValidationBlocks, validation_tokens
from mf_train.errors import UserError
from mf_train.model.attention.masks import document_numbers
from mf_train.model.model import MemoryFormer
from mf_train.standalone.exported.names import DOCUMENT_ATTENTION
from mf_train.standalone.folder import CONFIG
from mf_train.standalone.use.load import load_model


@dataclass(frozen=True)
class Evaluation:
    """Sums over all predicted tokens."""

    loss: float  # nats a token
    tokens: int
    bytes: int  # of UTF-8 text that the tokens stand for

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the tokens stand for no bytes, such as an end of text alone."""
        return self.loss * self.tokens / self.bytes / math.log(2) if self.bytes else None


def evaluate(
    model: Path,
    data: Sequence[str],
    sequence_length: int | None = None,
    sequences: int = 0,
    batch_size: int = 8,
) -> Iterator[str]:
    """Yield the lines that `memoryformer evaluate` shows. `sequences` 0: all the text. Raises UserError."""
    for option, value, least in (
        ("--sequence-length", sequence_length, 1),
        ("--sequences", sequences, 0),
        ("--batch-size", batch_size, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{option} is {value}: it must be at least {least}")
    plain = load_model(model)
    sources = [SourceConfig(path=path) for path in data]
    length = sequence_length or plain.config.sequence_length
    tokenizer = tokenizer_in(model)
    tokens = validation_tokens(sources, DataConfig(), tokenizer, length, sequences, key="--data")
    blocks = ValidationBlocks(tokens, tokenizer, length)
    documents = bool(json.loads((model / CONFIG).read_text(encoding="utf-8")).get(DOCUMENT_ATTENTION))
    result = measure(plain, blocks, batch_size, tokenizer.end_of_text_id if documents else None)
    yield f"loss           {result.loss:.6f} nats a token"
    yield f"perplexity     {result.perplexity:.4f}"
    bits = result.bits_per_byte
    yield f"bits per byte  {'unknown' if bits is None else f'{bits:.4f}'}"
    yield f"tokens         {result.tokens:,} ({result.bytes:,} bytes of text) in blocks of {length}"
    if documents:
        yield "attention      inside documents, as in training"


@torch.no_grad()
def measure(
    model: MemoryFormer, blocks: ValidationBlocks, batch_size: int, end_of_text: int | None = None
) -> Evaluation:
    """The model's mean loss over the blocks, summed in float64 as the trainer does.

    With `end_of_text` a block's documents do not attend to each other.
    """
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(blocks), batch_size):
        rows = [blocks[i] for i in range(start, min(start + batch_size, len(blocks)))]
        inputs = torch.stack([torch.from_numpy(row[0]) for row in rows])
        targets = torch.stack([torch.from_numpy(row[1]) for row in rows])
        documents = None if end_of_text is None else document_numbers(inputs, end_of_text)
        total += model(inputs, targets, documents_bs=documents).sum(dtype=torch.float64)
    return Evaluation(total.item() / blocks.num_tokens, blocks.num_tokens, blocks.num_bytes)
