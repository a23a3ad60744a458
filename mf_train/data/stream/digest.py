"""Digests of batches that ranks compute for their own rows and add up, without gathering tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_MODULUS = 1 << 64


def row_digest(row_number: int, tokens: npt.NDArray[np.integer[Any]]) -> int:
    """64-bit digest of one row: BLAKE2b of the row's number in the global batch and its tokens as int32."""
    little_endian = np.ascontiguousarray(tokens, dtype="<i4")
    digest = hashlib.blake2b(row_number.to_bytes(8, "little"), digest_size=8)
    digest.update(little_endian.tobytes())
    return int.from_bytes(digest.digest(), "little")


def rows_digest(row_numbers: Iterable[int], rows: npt.NDArray[np.integer[Any]]) -> int:
    """Sum of the rows' digests modulo 2^64: a rank's part of a global batch's digest."""
    return sum(row_digest(number, row) for number, row in zip(row_numbers, rows, strict=True)) % _MODULUS


def to_int64(digest: int) -> int:
    """The same 64 bits as a signed number, for an all-reduce: int64 sums wrap around as digests do."""
    return (digest + (_MODULUS >> 1)) % _MODULUS - (_MODULUS >> 1)


def from_int64(value: int) -> int:
    """Inverse of `to_int64`."""
    return value % _MODULUS


def format_digest(digest: int) -> str:
    """16 hexadecimal digits."""
    return f"{digest:016x}"


def batch_digest(rows: npt.NDArray[np.integer[Any]]) -> str:
    """Digest of a whole global batch [G, S + 1] in hexadecimal: what `metrics.jsonl` records."""
    return format_digest(rows_digest(range(len(rows)), rows))
