"""Digests of batches that ranks compute for their own rows and add up, without gathering tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

_MODULUS = 1 << 64
LIMBS = 4


def row_digest(row_number: int, tokens: npt.NDArray[np.integer[Any]]) -> int:
    """64-bit digest of one row: BLAKE2b of the row's number in the global batch and its tokens as int32."""
    little_endian = np.ascontiguousarray(tokens, dtype="<i4")
    digest = hashlib.blake2b(row_number.to_bytes(8, "little"), digest_size=8)
    digest.update(little_endian.tobytes())
    return int.from_bytes(digest.digest(), "little")


def rows_digest(row_numbers: Iterable[int], rows: npt.NDArray[np.integer[Any]]) -> int:
    """Sum of the rows' digests modulo 2^64: a rank's part of a global batch's digest."""
    return sum(row_digest(number, row) for number, row in zip(row_numbers, rows, strict=True)) % _MODULUS


def to_limbs(digest: int) -> list[int]:
    """Its 64 bits in LIMBS parts of 16, lowest first: of these, sums over ranks are exact in float64."""
    return [digest >> 16 * place & 0xFFFF for place in range(LIMBS)]


def from_limbs(sums: Iterable[float]) -> int:
    """The sum, modulo 2^64, of digests whose limbs have these sums."""
    return sum(int(limb) << 16 * place for place, limb in enumerate(sums)) % _MODULUS


def format_digest(digest: int) -> str:
    """16 hexadecimal digits."""
    return f"{digest:016x}"


def batch_digest(rows: npt.NDArray[np.integer[Any]]) -> str:
    """Digest of a whole global batch [G, S + 1] in hexadecimal: what `metrics.jsonl` records."""
    return format_digest(rows_digest(range(len(rows)), rows))
