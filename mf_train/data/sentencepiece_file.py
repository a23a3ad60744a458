"""Reads a sentencepiece model's pieces and settings from its file.

sentencepiece itself tells neither the settings nor which pieces are user-defined, and its classes for the file need the
protobuf package. The file is a protocol buffer, message ModelProto of
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto; wire format:
https://protobuf.dev/programming-guides/encoding/.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # a piece's type
UNIGRAM, BPE, WORD, CHAR = range(1, 5)  # TrainerSpec.model_type
SPACE_MARK = "\u2581"  # how sentencepiece writes a space inside pieces


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list. A space is written U+2581."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencepieceModel:
    """The parts of a sentencepiece model that determine tokenisation."""

    pieces: list[Piece]
    model_type: int
    byte_fallback: bool
    charsmap: bytes  # the normaliser's rules; empty for identity
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool  # the prefixed space, if any, stands at the end

    @property
    def user_defined(self) -> list[str]:
        return [piece.text for piece in self.pieces if piece.type == USER_DEFINED]

    @property
    def splits_at_spaces(self) -> bool:
        """Whether no piece has a space after another character, so that words are tokenised each by itself."""
        pieces = (piece.text for piece in self.pieces if piece.type in (NORMAL, USER_DEFINED))
        return all(SPACE_MARK not in text.lstrip(SPACE_MARK) for text in pieces)


def parse_sentencepiece(data: bytes) -> SentencepieceModel:
    """The model in a `.model` file's bytes, which sentencepiece itself has accepted."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            piece = dict(_fields(value))
            text, score, kind = piece.get(1, b""), piece.get(2, b"\0\0\0\0"), piece.get(3, NORMAL)
            assert isinstance(text, bytes) and isinstance(score, bytes) and isinstance(kind, int)
            pieces.append(Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    model_type, charsmap = trainer.get(3, UNIGRAM), normalizer.get(2, b"")
    assert isinstance(model_type, int) and isinstance(charsmap, bytes)
    return SentencepieceModel(
        pieces=pieces,
        model_type=model_type,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        whitespace_as_suffix=bool(trainer.get(24, 0)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a message in order: an integer, or the bytes of anything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if kind == 2:
            size, position = _varint(data, position)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            return value, position
