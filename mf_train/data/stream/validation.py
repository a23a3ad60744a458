"""Held-out text as fixed blocks: the trainer and `memoryformer evaluate` read the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from mf_train.config import DataConfig, SourceConfig
from mf_train.data.documents import Source, Tokens
from mf_train.data.sources import open_source
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError

IGNORED = -100  # target of padding: cross-entropy's ignore_index

_DOCUMENTS_AT_ONCE = 1024
_TOKENS_AT_ONCE = 1 << 16


class ValidationBlocks:
    """Tokens cut in blocks of S + 1 that overlap by one: every token but the very first is predicted once.

    `blocks[i]` is (inputs [S], targets [S]), int64. The last block is filled up with end of text whose
    targets are IGNORED. `num_tokens` counts the predicted tokens, `num_bytes` the UTF-8 bytes they stand
    for (end of text stands for none): bits per byte = loss * num_tokens / num_bytes / ln 2.
    """

    def __init__(self, tokens_t: npt.NDArray[np.int32], tokenizer: Tokenizer, sequence_length: int) -> None:
        assert len(tokens_t) >= 2
        self.tokens_t = tokens_t
        self.sequence_length = sequence_length
        self.num_tokens = len(tokens_t) - 1
        self.num_bytes = int(tokenizer.token_bytes[tokens_t[1:]].sum(dtype=np.int64))
        self._padding = tokenizer.end_of_text_id

    def __len__(self) -> int:
        return -(-self.num_tokens // self.sequence_length)

    def __getitem__(self, i: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if not 0 <= i < len(self):
            raise IndexError(f"there are {len(self)} validation blocks: there is no block {i}")
        block = self.tokens_t[i * self.sequence_length : (i + 1) * self.sequence_length + 1].astype(np.int64)
        missing = self.sequence_length + 1 - len(block)
        inputs = np.concatenate([block[:-1], np.full(missing, self._padding)])
        targets = np.concatenate([block[1:], np.full(missing, IGNORED)])
        return inputs, targets

    def unigram_entropy(self) -> float:
        """Entropy of the predicted tokens' own frequencies, in nats a token.

        No model that ignores context can have a lower loss on these tokens, whatever it was trained on.
        """
        counts = np.unique(self.tokens_t[1:], return_counts=True)[1]
        shares = counts / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def deal_blocks(blocks: int, weights: Sequence[float]) -> list[int]:
    """So many blocks for sets of these weights: one for each, the rest by weight. Of 0, which stands for all, 0."""
    if not blocks:
        return [0] * len(weights)
    sums = list(accumulate(weights, initial=0.0))
    ends = [round((blocks - len(weights)) * end / sums[-1]) for end in sums]
    return [1 + end - start for start, end in pairwise(ends)]


def set_tokens(data: DataConfig, tokenizer: Tokenizer, sequence_length: int, limit: int) -> Iterator[Tokens]:
    """`validation_tokens` of each set of `data.validation`, with its share of `limit`."""
    limits = deal_blocks(limit, [each.weight for each in data.validation])
    for index, (each, share) in enumerate(zip(data.validation, limits, strict=True)):
        yield validation_tokens([each], data, tokenizer, sequence_length, share, first=index)


def validation_tokens(
    sources: Sequence[SourceConfig],
    data: DataConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    limit: int = 0,
    key: str = "data.validation",
    first: int = 0,
) -> Tokens:
    """Tokens of the first `limit` (0: all) validation blocks: the sources' documents in order, each with end of text.

    `key` is named in errors, with numbers from `first`. Weights do not matter here. Memory: 4 bytes a token.
    Raises UserError or OSError when a source cannot be read, and UserError for fewer than two tokens.
    """
    wanted = limit * sequence_length + 1 if limit else None
    parts: list[Tokens] = []
    held = 0
    for index, config in enumerate(sources, first):
        for tokens in _all_tokens(open_source(config, f"{key}[{index}]", data, tokenizer)):
            if wanted is not None and held >= wanted:
                break
            parts.append(tokens)
            held += len(tokens)
    if held < 2:
        raise UserError(f"{key}: no text in the validation sources: name files with at least a few words")
    return np.concatenate(parts)[:wanted]


def _all_tokens(source: Source) -> Iterator[Tokens]:
    for begin in range(0, source.num_documents, _DOCUMENTS_AT_ONCE):
        documents = range(begin, min(begin + _DOCUMENTS_AT_ONCE, source.num_documents))
        index, start = 0, 0
        while index < len(documents):
            chunk = source.read(documents[index:], start, _TOKENS_AT_ONCE)
            yield chunk.tokens
            index, start = index + chunk.end[0], chunk.end[1]
