"""The order of rows' sources and of a source's documents, in O(window) memory.

Nothing is drawn from a generator with a state: every place of an order is computed from its number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

_ROUNDS = 8
_ROUNDS_OF_SMALL = 16  # 8 leave the permutations of five elements measurably uneven
_SMALL = 4096
_BLOCKS_OF_A_STREAM = 16  # at least so many an epoch, where there are documents enough


class Mixture:
    """Which source a row comes from: a fixed sequence that keeps every source's count within about one of its share.

    Element n is the source with the largest deficit, share * (n + 1) - (times taken before); the first of
    equals. Stream s starts at element s, so streams that advance together are at different places of the
    sequence and each batch, too, has nearly the right shares.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        # in integers, so that ties are the same everywhere; a weight counts as it is written, 0.1 as 1/10
        exact = [Fraction(repr(float(weight))) for weight in weights]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * denominator) for weight in exact]
        self._total = sum(self._weights)

    def starting_counts(self, start: int) -> list[int]:
        """How often each source stands among the first `start` elements."""
        counts = [0] * len(self._weights)
        for _ in range(start):
            counts[self.next_source(counts)] += 1
        return counts

    def next_source(self, counts: Sequence[int]) -> int:
        """The element that follows `counts`, the elements taken since the beginning of the sequence."""
        if len(counts) == 1:
            return 0
        position = sum(counts) + 1
        deficits = [
            weight * position - self._total * count
            for weight, count in zip(self._weights, counts, strict=True)
        ]
        return deficits.index(max(deficits))


class EpochOrder:
    """Epochs of `size` elements, concatenated without end: `order[n]` is an element's number.

    Epoch e = n // size is a permutation that depends on (seed, source, e) alone: a Feistel network
    on pairs (left, right) with left < a, right < b and a * b >= size, whose rounds add a hash of one
    half to the other; results outside the range are encrypted again (cycle walking; Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"). The hash is BLAKE2b: the same on every platform and version.
    """

    def __init__(self, *, seed: int, source: int, size: int) -> None:
        assert size >= 1
        self.seed = seed
        self.source = source
        self.size = size
        self._left = math.isqrt(size - 1) + 1  # ceil(sqrt(size))
        self._right = -(-size // self._left)
        self._rounds = _ROUNDS_OF_SMALL if size < _SMALL else _ROUNDS

    def __getitem__(self, n: int) -> int:
        epoch, position = divmod(n, self.size)
        key = _epoch_key(self.seed, self.source, epoch)
        while True:
            position = self._encrypt(position, key)
            if position < self.size:
                return position

    def _encrypt(self, position: int, key: bytes) -> int:
        left, right = divmod(position, self._right)
        for round_number in range(0, self._rounds, 2):
            left = (left + _round_hash(key, round_number, right)) % self._left
            right = (right + _round_hash(key, round_number + 1, left)) % self._right
        return left * self._right + right


class WindowOrder:
    """The documents that each logical stream reads, window after window without end.

    A source's documents are cut into blocks of neighbours, whose order is an `EpochOrder`; stream s of L has its
    elements s, s + L, s + 2 L, ... A window is `window_blocks` of a stream's blocks, and its documents are permuted
    by the rank of a hash (SHAKE-128) of (seed, source, stream, window). So reading is sequential inside blocks,
    and where a stream is takes three numbers to say.

    A small source has smaller blocks, so that a stream gets 16 an epoch if there are documents enough, and
    windows that are not longer than a stream's share of an epoch.
    """

    def __init__(
        self,
        *,
        seed: int,
        source: int,
        num_documents: int,
        streams: int,
        block_documents: int,
        window_blocks: int,
    ) -> None:
        self.num_documents = num_documents
        self.block_documents = min(block_documents, max(1, num_documents // (_BLOCKS_OF_A_STREAM * streams)))
        self.num_blocks = -(-num_documents // self.block_documents)
        self.window_blocks = min(window_blocks, max(1, self.num_blocks // streams))
        self._blocks = EpochOrder(seed=seed, source=source, size=self.num_blocks)
        self._streams = streams

    def window(self, stream: int, number: int) -> list[int]:
        """Document numbers of a stream's window, in the order of reading; not empty."""
        first = number * self.window_blocks
        documents: list[int] = []
        for element in range(first, first + self.window_blocks):
            begin = self._blocks[stream + element * self._streams] * self.block_documents
            documents += range(begin, min(begin + self.block_documents, self.num_documents))
        if len(documents) == 1:
            return documents
        words = f"window order {self._blocks.seed} {self._blocks.source} {stream} {number}".encode("ascii")
        keys = np.frombuffer(hashlib.shake_128(words).digest(8 * len(documents)), "<u8")
        permuted: list[int] = np.array(documents)[keys.argsort(kind="stable")].tolist()
        return permuted


@lru_cache(maxsize=1024)
def _epoch_key(seed: int, source: int, epoch: int) -> bytes:
    words = f"document order {seed} {source} {epoch}".encode("ascii")
    return hashlib.blake2b(words, digest_size=32).digest()


def _round_hash(key: bytes, round_number: int, half: int) -> int:
    message = bytes((round_number,)) + half.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=key).digest(), "little")
