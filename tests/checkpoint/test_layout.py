"""The manifest, and which part of a checkpoint holds what."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from pathlib import Path

import pytest

from mf_train.checkpoint.layout import (
    FORMAT,
    KINDS,
    MANIFEST,
    FileRecord,
    Manifest,
    assign_parts,
    read_manifest,
)
from mf_train.errors import UserError


def example() -> Manifest:
    shapes = {"embedding.weight": (12, 8), "norm.bias": (8,)}
    files = {"weights-0-of-1-part-000.safetensors": FileRecord(0, 0)}
    return Manifest(FORMAT, 3, 1, KINDS, shapes, {"embedding.weight": 0, "norm.bias": 1}, files)


def write(folder: Path, text: str) -> Path:
    for name in example().files:
        (folder / name).touch()
    (folder / MANIFEST).write_text(text)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_manifest(write(tmp_path, example().to_json())) == example()


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path: Path) -> None:
    """But for one that changes only how the JSON is written."""
    data = bytearray(example().to_json().encode())
    write(tmp_path, data.decode())
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / MANIFEST).write_bytes(data)
        try:
            same = read_manifest(tmp_path, check_sizes=False) == example()
        except UserError as error:
            same = MANIFEST in str(error)
        assert same, data
        data[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "7", '{"format": 2}', '{"format": 2, "crc32": 0}'])
def test_another_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: damaged"):
        read_manifest(write(tmp_path, text))


def test_another_format_is_named(tmp_path: Path) -> None:
    old = json.loads(dataclasses.replace(example(), format=1).to_json())
    with pytest.raises(UserError, match=f"format 1, this version reads formats {FORMAT} and 3"):
        read_manifest(write(tmp_path, json.dumps(old)))


def test_parts() -> None:
    assert assign_parts({"a": 4, "b": 4, "c": 3, "d": 20, "e": 1, "f": 9}, 10) == {
        "a": 0,
        "b": 0,
        "c": 1,
        "d": 2,
        "e": 3,
        "f": 3,
    }
    generator = random.Random(2)
    for _ in range(50):
        sizes = {str(i): generator.randrange(1, 30) for i in range(generator.randrange(1, 40))}
        parts = assign_parts(sizes, 40)
        assert list(parts) == list(sizes) and sorted(parts.values()) == list(parts.values())
        assert set(parts.values()) == set(range(max(parts.values()) + 1))
        filled = [sum(sizes[n] for n in sizes if parts[n] == part) for part in set(parts.values())]
        assert max(filled) <= 40
        assert all(a + b > 40 - 30 for a, b in itertools.pairwise(filled))
