"""The order of a source's documents: one pseudo-random permutation an epoch, in O(1) memory."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

_ROUNDS = 8
_ROUNDS_OF_SMALL = 16  # 8 leave the permutations of five documents measurably uneven
_SMALL = 4096


class DocumentOrder:
    """Epochs of a source's documents, concatenated without end: `order[n]` is a document's number.

    Epoch e = n // num_documents is a permutation that depends on (seed, source, e) alone: a Feistel network
    on pairs (left, right) with left < a, right < b and a * b >= num_documents, whose rounds add a hash of one
    half to the other; results outside the range are encrypted again (cycle walking; Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains"). The hash is BLAKE2b: the same on every platform and version.
    """

    def __init__(self, *, seed: int, source: int, num_documents: int) -> None:
        assert num_documents >= 1
        self.seed = seed
        self.source = source
        self.num_documents = num_documents
        self._left = math.isqrt(num_documents - 1) + 1  # ceil(sqrt(num_documents))
        self._right = -(-num_documents // self._left)
        self._rounds = _ROUNDS_OF_SMALL if num_documents < _SMALL else _ROUNDS

    def __getitem__(self, n: int) -> int:
        epoch, position = divmod(n, self.num_documents)
        key = _epoch_key(self.seed, self.source, epoch)
        while True:
            position = self._encrypt(position, key)
            if position < self.num_documents:
                return position

    def _encrypt(self, position: int, key: bytes) -> int:
        left, right = divmod(position, self._right)
        for round_number in range(0, self._rounds, 2):
            left = (left + _round_hash(key, round_number, right)) % self._left
            right = (right + _round_hash(key, round_number + 1, left)) % self._right
        return left * self._right + right


@lru_cache(maxsize=1024)
def _epoch_key(seed: int, source: int, epoch: int) -> bytes:
    words = f"document order {seed} {source} {epoch}".encode("ascii")
    return hashlib.blake2b(words, digest_size=32).digest()


def _round_hash(key: bytes, round_number: int, half: int) -> int:
    message = bytes((round_number,)) + half.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(message, digest_size=8, key=key).digest(), "little")
