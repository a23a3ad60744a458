"""CRC-32 by pieces against zlib's of the whole."""

from __future__ import annotations

import functools
import itertools
import operator
import random
import zlib
from pathlib import Path

import pytest

from mf_train.checkpoint import checksum
from mf_train.checkpoint.checksum import crc_of_file, crc_of_piece, read_crcs


def test_shares_of_any_pieces_in_any_order() -> None:
    generator = random.Random(1)
    for size in [0, 1, 2, 7, 64, 1000, 4097, *(generator.randrange(20_000) for _ in range(30))]:
        data = generator.randbytes(size)
        cuts = sorted({0, size, *(generator.randrange(size + 1) for _ in range(generator.randrange(9)))})
        pieces = list(itertools.pairwise(cuts))
        generator.shuffle(pieces)
        shares = 0
        for first, last in pieces:
            shares ^= crc_of_piece(data[first:last], size - last)
        assert crc_of_file(shares, size) == zlib.crc32(data)


def test_a_piece_far_from_the_end() -> None:
    """Against zlib over 2^24 zeros, and at 100 GB before the end against itself in two steps."""
    piece, zeros = b"a piece", 1 << 24
    expected = zlib.crc32(bytes(zeros), zlib.crc32(piece)) ^ zlib.crc32(
        bytes(zeros), zlib.crc32(bytes(len(piece)))
    )
    assert crc_of_piece(piece, zeros) == expected
    # linear: the share before a + b zeros is that of the share itself, as a piece of 4 bytes, before b
    as_bytes = crc_of_piece(piece, 10**11).to_bytes(4, "little")
    assert crc_of_piece(piece, 10**11 + 9) == crc_of_piece(as_bytes, 9 - 4)


@pytest.mark.parametrize("readers", [1, 2, 3, 7, 64])
def test_readers_together_read_every_byte_once(
    tmp_path: Path, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksum, "PIECE_BYTES", 100)
    generator = random.Random(readers)
    sizes = {"a": 1000, "empty": 0, "b": 1, "c": 12_345}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(generator.randbytes(size))

    def sums() -> dict[str, int]:
        shares = zip(*(read_crcs(tmp_path, sizes, reader, readers) for reader in range(readers)), strict=True)
        combined = [functools.reduce(operator.xor, mine) for mine in shares]
        return {name: crc_of_file(both, sizes[name]) for name, both in zip(sizes, combined, strict=True)}

    expected = {name: zlib.crc32((tmp_path / name).read_bytes()) for name in sizes}
    assert sums() == expected
    data = bytearray((tmp_path / "c").read_bytes())
    for bit in (0, 8 * 6000 + 3, 8 * 12_345 - 1):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "c").write_bytes(data)
        assert {name for name, found in sums().items() if found != expected[name]} == {"c"}
        data[bit // 8] ^= 1 << bit % 8
    (tmp_path / "c").write_bytes(data[:-1])  # shorter than the size given
    assert {name for name, found in sums().items() if found != expected[name]} <= {"c"}
    (tmp_path / "b").unlink()
    with pytest.raises(FileNotFoundError, match="b'"):
        sums()
