"""CRC-32 of a file from its pieces, which several processes write or read in any order: the XOR of `crc_of_piece`.

The same CRC-32 as zlib, gzip and PNG (https://www.w3.org/TR/png/#D-CRCAppendix). It is linear over GF(2) but for its
start value and final inversion, so what a piece adds depends on no other piece: only on its distance to the file's end.
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


def crc_of_piece(piece: bytes | memoryview, bytes_behind: int) -> int:
    """A piece's contribution, by XOR, to its file's checksum; `bytes_behind` more bytes of the file follow it."""
    return shifted(continue_crc(0, piece), bytes_behind)


def crc_of_file(pieces: int, size: int) -> int:
    """CRC-32 of a file of `size` bytes from the XOR of `crc_of_piece` over pieces that make up the file."""
    return pieces ^ shifted(_ALL, size) ^ _ALL


def continue_crc(register: int, piece: bytes | memoryview) -> int:
    """Continue a raw CRC register (0 at the start) over `piece`; `shifted` makes it what `crc_of_piece` gives."""
    return zlib.crc32(piece, register ^ _ALL) ^ _ALL


def shifted(register: int, zeros: int) -> int:
    """A raw CRC register continued over so many zero bytes: register * x^(8 zeros) modulo the polynomial."""
    factor, power = _ONE, _ONE >> 8
    while zeros:
        if zeros & 1:
            factor = _multiply(factor, power)
        power = _multiply(power, power)
        zeros >>= 1
    return _multiply(register, factor)


def read_crcs(
    folder: Path,
    sizes: Mapping[str, int],
    reader: int,
    readers: int,
    still_alive: Callable[[], None] = lambda: None,
) -> list[int]:
    """`crc_of_piece` of what reader number `reader` of `readers` reads of each file: all files, evenly, in order.

    `sizes` are in bytes; of a file that is shorter, the missing bytes count as zeros. `still_alive` is called after
    each file. Raises OSError.
    """
    total = sum(sizes.values())
    begin, end = total * reader // readers, total * (reader + 1) // readers
    crcs, start = [], 0
    for name, size in sizes.items():
        first, last = max(begin - start, 0), min(end - start, size)
        crcs.append(_read_crc(folder / name, first, last, size) if first < last else 0)
        start += size
        still_alive()
    return crcs


def _read_crc(path: Path, first: int, last: int, size: int) -> int:
    """`crc_of_piece` of bytes [first, last) of a file of `size` bytes."""
    register, file = 0, os.open(path, os.O_RDONLY)
    try:
        with path_in_errors(path):
            while first < last and (piece := os.pread(file, min(PIECE_BYTES, last - first), first)):
                register = continue_crc(register, piece)
                first += len(piece)
    finally:
        os.close(file)
    return shifted(register, size - first)


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials modulo the CRC's."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = a << 1 & _ALL
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
