"""Numbered documents as tokens, which the stream reads: the interface `Source`, and text that is tokenised for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mf_train.data.segments import SEGMENT_BYTES, segment_end
from mf_train.data.tokenizer import CONTEXT_CHARACTERS, Tokenizer

_FINGERPRINT_SAMPLES = 64
_LONGEST_CHARACTER = 4  # bytes

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of a list of documents, in pieces; each document ends with end of text.

    Piece p is `tokens[offsets[p]:offsets[p + 1]]` and begins at `places[p]` = (index into the list, start in that
    document). `end` is the place after the last token: (length of the list, 0) when everything is read.
    """

    tokens: Tokens
    offsets: list[int]
    places: list[tuple[int, int]]
    end: tuple[int, int]


class Source(Protocol):
    """Documents 0 ... num_documents - 1. A `start` in a document is 0 at its beginning and otherwise the source's own
    (bytes of text, tokens of a shard): it comes from a chunk.
    """

    name: str  # what the configuration calls it
    num_files: int  # 0 where it has none of its own: the hub
    num_documents: int
    num_bytes: int | None  # UTF-8 bytes of the text, or None where only tokens are known
    num_tokens: int | None  # with one end of text a document, or None where they are not counted yet
    skipped: dict[str, int]  # documents left out of each damaged file (`data.on_error: skip`)
    left_out: Sequence[str]  # files of its folder whose formats are not known
    starts_are_tokens: bool  # so that t tokens after a start is the start + t

    @property
    def fingerprint(self) -> str:
        """Of the content: a hash of its size and a sample."""

    def read(self, documents: Sequence[int], start: int, wanted: int) -> Chunk:
        """The tokens of `documents` in this order, the first of them from `start`; `documents` is not empty.

        Gives at least one piece, and need not give more than `wanted` tokens. Raises UserError or OSError.
        """


class TextDocuments:
    """Random access to the text of numbered documents, none of them empty. A subclass says where the bytes are.

    `files` counts the source's files; `skipped` holds the documents left out of each damaged one.
    """

    name: str
    files: int
    num_bytes: int
    skipped: dict[str, int]
    left_out: Sequence[str] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def length(self, i: int) -> int:
        """UTF-8 bytes of document i. Raises IndexError outside [0, len)."""
        _, begin, end = self._locate(i)
        return end - begin

    def text(self, i: int, start: int = 0, size: int | None = None) -> bytes:
        """UTF-8 bytes start ... start + size (default: all) of document i.

        Raises IndexError outside [0, len), UserError or OSError where they cannot be read.
        """
        where, begin, end = self._locate(i)
        begin = min(begin + start, end)
        return self._read(where, begin, end if size is None else min(begin + size, end))

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the number of documents, their bytes and a sample of them: cheap, not a full hash.

        It depends on the content only: moving, compressing or re-sharding the files does not change it.
        """
        count = len(self)
        digest = hashlib.blake2b(f"{count} {self.num_bytes}".encode("ascii"), digest_size=8)
        samples = min(count, _FINGERPRINT_SAMPLES)
        for sample in range(samples):  # the first, the last and evenly between
            document = sample * (count - 1) // max(1, samples - 1)
            digest.update(self.length(document).to_bytes(8, "little"))
            digest.update(self.text(document, 0, 4096))
        return digest.hexdigest()

    def _locate(self, i: int) -> tuple[Any, int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} documents: there is no document {i}")
        return self._find(i)

    def _find(self, i: int) -> tuple[Any, int, int]:
        """What holds document i, and where its text begins and ends there."""
        raise NotImplementedError

    def _read(self, where: Any, begin: int, end: int) -> bytes:
        raise NotImplementedError


class TextSource:
    """Text that is tokenised when it is reached, a segment a chunk: a document's length does not matter."""

    starts_are_tokens = False

    def __init__(self, documents: TextDocuments, tokenizer: Tokenizer) -> None:
        self.name = documents.name
        self.num_files = documents.files
        self.num_documents = len(documents)
        self.num_bytes: int | None = documents.num_bytes
        self.num_tokens: int | None = None
        self.skipped = documents.skipped
        self.left_out = documents.left_out
        self.documents = documents
        self._tokenizer = tokenizer
        self._end_of_text = np.array([tokenizer.end_of_text_id], np.int32)

    @property
    def fingerprint(self) -> str:
        return self.documents.fingerprint

    def read(self, documents: Sequence[int], start: int, wanted: int) -> Chunk:
        """One segment, from byte `start` of the first document, as `Source.read` says."""
        document = documents[0]
        utf8 = read_segment(self.documents, self._tokenizer, document, start)
        context = self._context(document, start) if start and self._tokenizer.reads_context else ""
        tokens = self._tokenizer.encode_array(utf8.decode("utf-8"), context)
        if start + len(utf8) < self.documents.length(document):
            return Chunk(tokens, [0, len(tokens)], [(0, start)], (0, start + len(utf8)))
        tokens = np.concatenate((tokens, self._end_of_text))
        return Chunk(tokens, [0, len(tokens)], [(0, start)], (1, 0))

    def _context(self, document: int, start: int) -> str:
        """The characters before byte `start`, as many as a tokenizer has to see."""
        begin = max(0, start - _LONGEST_CHARACTER * CONTEXT_CHARACTERS)
        utf8 = self.documents.text(document, begin, start - begin)
        return utf8.decode("utf-8", "ignore")[-CONTEXT_CHARACTERS:]  # the first may be cut in two


def read_segment(documents: TextDocuments, tokenizer: Tokenizer, i: int, start: int) -> bytes:
    """UTF-8 bytes of document i from `start` on, up to a place where `tokenizer` lets it be cut, or to its end."""
    limit = SEGMENT_BYTES
    while True:
        utf8 = documents.text(i, start, limit + 1)
        if len(utf8) <= limit:
            return utf8
        if size := tokenizer.cut(utf8, limit):
            return utf8[:size]
        limit *= 2


def segments_of(documents: TextDocuments, i: int, limit: int = SEGMENT_BYTES) -> Iterator[str]:
    """The segments of document i, of at most `limit` bytes; joined, they are its text."""
    start, length = 0, documents.length(i)
    while start < length:
        utf8 = documents.text(i, start, limit + 1)
        size = segment_end(utf8, limit)
        yield utf8[:size].decode("utf-8")
        start += size


def last_cut(documents: TextDocuments, tokenizer: Tokenizer, i: int, start: int, size: int) -> int:
    """Where the last segment of document i ends that lies within `size` bytes from `start`, an end of a segment.

    `start` itself where none does, and never the document's end.
    """
    end, length = start, documents.length(i)
    while end + SEGMENT_BYTES <= start + size:
        after = end + len(read_segment(documents, tokenizer, i, end))
        if after >= min(length, start + size + 1):
            break
        end = after
    return end
