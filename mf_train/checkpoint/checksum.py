"""CRC-32 of files that several processes write and read by pieces: each piece gives a share, the shares' XOR the sum.

The same CRC-32 as zlib, gzip and PNG (https://www.w3.org/TR/png/#D-CRCAppendix). It is linear over GF(2) but for its
start value and final inversion, so a piece's share needs no other piece: only its distance to the file's end.
"""

import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from mf_train.files import path_in_errors

PIECE_BYTES = 4 << 20
_POLYNOMIAL = 0xEDB88320  # bits reversed: the coefficient of x^0 is the highest bit
_ONE = 1 << 31
_ALL = 0xFFFFFFFF


def share(piece: bytes | memoryview, bytes_behind: int) -> int:
    """Share of a file's checksum of a piece that is followed by `bytes_behind` more bytes of the file."""
    return place(extend(0, piece), bytes_behind)


def extend(register: int, piece: bytes | memoryview) -> int:
    """The register of neighbouring bytes, 0 for none, with `piece` behind them; `place` makes a share of it."""
    return zlib.crc32(piece, register ^ _ALL) ^ _ALL


def whole(shares: int, size: int) -> int:
    """CRC-32 of a file of `size` bytes from the XOR of the shares of all its bytes."""
    return shares ^ place(_ALL, size) ^ _ALL


def read_shares(
    folder: Path,
    sizes: Mapping[str, int],
    reader: int,
    readers: int,
    beat: Callable[[], None] = lambda: None,
) -> list[int]:
    """Each file's share of the bytes that reader number `reader` of `readers` reads: all files, evenly, in order.

    `sizes` are in bytes; of a file that is shorter, the missing bytes count as zeros. `beat` is called after each
    file. Raises OSError.
    """
    total = sum(sizes.values())
    begin, end = total * reader // readers, total * (reader + 1) // readers
    shares, start = [], 0
    for name, size in sizes.items():
        first, last = max(begin - start, 0), min(end - start, size)
        shares.append(_read_share(folder / name, first, last, size) if first < last else 0)
        start += size
        beat()
    return shares


def _read_share(path: Path, first: int, last: int, size: int) -> int:
    """Share of bytes [first, last) of a file."""
    register, file = 0, os.open(path, os.O_RDONLY)
    try:
        with path_in_errors(path):
            while first < last and (piece := os.pread(file, min(PIECE_BYTES, last - first), first)):
                register = extend(register, piece)
                first += len(piece)
    finally:
        os.close(file)
    return place(register, size - first)


def place(register: int, bytes_behind: int) -> int:
    """The share of bytes with this register that are followed by so many more.

    It is register * x^(8 bytes_behind) modulo the polynomial, the remainder that zero bytes behind them would leave.
    """
    factor, power = _ONE, _ONE >> 8
    while bytes_behind:
        if bytes_behind & 1:
            factor = _multiply(factor, power)
        power = _multiply(power, power)
        bytes_behind >>= 1
    return _multiply(register, factor)


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _ALL
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
