"""One token shard: Megatron's pair of a .bin (tokens) and an .idx (where they begin and end), read and written.

The format is megatron-core 0.16.1's, megatron/core/datasets/indexed_dataset.py, which GPT-NeoX shares. The index is,
in little-endian: 9 bytes `MMIDIDX`, version 1 (uint64), the code of the tokens' type (uint8), the numbers of sequences
and of document marks (uint64), then the sequences' lengths in tokens (int32), their first bytes in the .bin
(int64) and the marks (int64): document d is the sequences marks[d] ... marks[d + 1] - 1.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mf_train.config import OnError
from mf_train.data.files.access import OpenFiles, read_exactly
from mf_train.errors import UserError
from mf_train.files import beside, sync, sync_file

DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_LARGEST_UINT16_VOCABULARY = 65500  # Megatron's own rule
_CHECKED_SEQUENCES = 65536


@dataclass(frozen=True, slots=True)
class Shard:
    """What the header and the files' sizes say. `num_documents` counts those that lie wholly in the .bin."""

    bin: str
    idx: str
    dtype: str
    num_sequences: int
    num_documents: int
    num_tokens: int  # of these documents, as they are stored
    num_bytes: int  # of the .bin that the index describes
    marked: bool  # whether documents are marked; if not, each sequence is one

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    def boundaries(self, files: OpenFiles, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where documents first ... last - 1 begin in the .bin, and where the last of them ends: bytes, int64.

        Two or three reads of the index. Raises UserError when it contradicts itself, OSError when it cannot be read.
        """
        marks = self._marks(files, first, last + 1)
        if marks[0] < 0 or marks[-1] > self.num_sequences or (marks[1:] < marks[:-1]).any():
            raise self._contradiction(first, last, "marks out of order")
        begins = self._pointers(files, marks)
        if begins[0] < 0 or begins[-1] > self.num_bytes or (begins[1:] < begins[:-1]).any():
            raise self._contradiction(first, last, "places out of order")
        sequences = int(marks[-1] - marks[0])
        if sequences <= _CHECKED_SEQUENCES:  # a document of more is nobody's, but reading it stays bounded
            lengths = self._array(files, "<i4", _HEADER.size + 4 * int(marks[0]), sequences)
            running = np.zeros(sequences + 1, np.int64)
            np.cumsum(lengths, out=running[1:])
            if (running[marks - marks[0]] * self.itemsize != begins - begins[0]).any():
                raise self._contradiction(first, last, "lengths that do not fit their places")
        elif ((begins - begins[0]) % self.itemsize).any():
            raise self._contradiction(first, last, "places inside a token")
        return begins

    def _marks(self, files: OpenFiles, first: int, last: int) -> npt.NDArray[np.int64]:
        if not self.marked:
            return np.arange(first, last, dtype=np.int64)
        offset = _HEADER.size + 12 * self.num_sequences + 8 * first
        return self._array(files, "<i8", offset, last - first)

    def _pointers(self, files: OpenFiles, sequences: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """First bytes of these ascending sequences; of num_sequences, the end of the tokens."""
        start = _HEADER.size + 4 * self.num_sequences
        low, high = int(sequences[0]), min(int(sequences[-1]) + 1, self.num_sequences)
        if high - low <= _CHECKED_SEQUENCES:
            begins = np.empty(high - low + 1, np.int64)
            begins[:-1] = self._array(files, "<i8", start + 8 * low, high - low)
            begins[-1] = self.num_bytes
            return begins[sequences - low]
        return np.array(
            [
                int(self._array(files, "<i8", start + 8 * s, 1)[0])
                if s < self.num_sequences
                else self.num_bytes
                for s in sequences.tolist()
            ]
        )

    def _array(self, files: OpenFiles, dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        return np.frombuffer(read_exactly(files, self.idx, offset, count * np.dtype(dtype).itemsize), dtype)

    def _contradiction(self, first: int, last: int, what: str) -> UserError:
        return UserError(
            f"{self.idx}: damaged: documents {first} to {last - 1} have {what}: copy or write the shard again"
        )


def open_shard(prefix: str, on_error: OnError) -> tuple[Shard | None, int]:
    """The shard `prefix`.bin and .idx, and how many of its documents are left out. Reads a few hundred bytes.

    A pair that is not whole is a UserError that says why. With `skip`, what lies wholly in a .bin that was cut is
    kept; of a pair with a missing file, another format or an index of a wrong size nothing is, and what is left
    out are the documents that the index speaks of, or 1 where it does not.
    Raises OSError when a file is there and cannot be read.
    """
    files = OpenFiles(limit=2)
    documents = 1
    try:
        shard, in_bin = _read_header(prefix, files)
        documents = max(1, shard.num_documents)
        shard = _check_index(shard, files)
    except UserError:
        if on_error == "raise":
            raise
        return None, documents
    finally:
        files.close()
    if shard.num_bytes == in_bin:
        return shard, 0
    if on_error == "raise":
        raise UserError(
            f"{shard.bin}: is {in_bin} bytes, but its index {shard.idx} describes {shard.num_bytes}: "
            "cut short, still being copied or of another shard; copy both again, or set data.on_error: skip"
        )
    kept, tokens = _count_whole(shard, in_bin)
    return replace(shard, num_documents=kept, num_tokens=tokens), shard.num_documents - kept


def _read_header(prefix: str, files: OpenFiles) -> tuple[Shard, int]:
    idx, binary = f"{prefix}.idx", f"{prefix}.bin"
    sizes = []
    for path, other in ((idx, binary), (binary, idx)):
        try:
            sizes.append(os.stat(path).st_size)
        except FileNotFoundError:
            raise UserError(f"{path} is missing: {other} needs it beside it") from None
    if sizes[0] < _HEADER.size:
        raise UserError(
            f"{idx}: is {sizes[0]} bytes, less than the header of an index: copy or write it again"
        )
    magic, version, code, sequences, marks = _HEADER.unpack(read_exactly(files, idx, 0, _HEADER.size))
    if magic != _MAGIC or version != 1:
        raise UserError(
            f"{idx}: not an index of Megatron's .bin/.idx (MMIDIDX, version 1): "
            "write the shards with 'memoryformer data tokenize', or with Megatron's or GPT-NeoX' mmap format"
        )
    if code not in DTYPES:
        raise UserError(
            f"{idx}: its tokens have type code {code}: tokens are whole numbers (codes {list(DTYPES)})"
        )
    expected = _HEADER.size + 12 * sequences + 8 * marks
    if sizes[0] != expected:
        raise UserError(
            f"{idx}: is {sizes[0]} bytes, but its header describes {expected}: "
            "cut short or still being copied; copy it again"
        )
    marked = marks > 1 or not sequences  # early mergers of shards lost the marks and kept the sequences
    shard = Shard(binary, idx, DTYPES[code], sequences, marks - 1 if marked else sequences, 0, 0, marked)
    return shard, sizes[1]


def _check_index(shard: Shard, files: OpenFiles) -> Shard:
    """The shard with `num_bytes`: the end of its last sequence, once its last mark is known to be the last."""
    if not shard.num_sequences:
        return replace(shard, num_documents=max(0, shard.num_documents))
    last = shard.num_sequences - 1
    pointer = int(shard._array(files, "<i8", _HEADER.size + 4 * shard.num_sequences + 8 * last, 1)[0])
    length = int(shard._array(files, "<i4", _HEADER.size + 4 * last, 1)[0])
    if length < 0 or pointer < 0:
        raise UserError(f"{shard.idx}: damaged: its last sequence has {length} tokens from byte {pointer}")
    mark = int(shard._marks(files, shard.num_documents, shard.num_documents + 1)[0])
    if mark != shard.num_sequences:
        raise UserError(
            f"{shard.idx}: damaged: its documents end at sequence {mark} of {shard.num_sequences}: "
            "copy or write the shard again"
        )
    end = pointer + length * shard.itemsize
    return replace(shard, num_bytes=end, num_tokens=end // shard.itemsize)


def _count_whole(shard: Shard, in_bin: int) -> tuple[int, int]:
    """How many documents end within the first `in_bin` bytes, and their tokens."""
    files = OpenFiles(limit=2)
    low, high, end = 0, shard.num_documents, 0
    while low < high:
        middle = (low + high) // 2
        middle_end = int(shard.boundaries(files, middle, middle + 1)[1])
        if middle_end <= in_bin:
            low, end = middle + 1, middle_end
        else:
            high = middle
    files.close()
    return low, end // shard.itemsize


def token_dtype(vocab_size: int) -> str:
    """The smallest type that Megatron uses for ids below `vocab_size`: uint16 or int32."""
    return "<u2" if vocab_size < _LARGEST_UINT16_VOCABULARY else "<i4"


def index_bytes(num_documents: int) -> int:
    """The size of the .idx of documents of one sequence each."""
    return _HEADER.size + 12 * num_documents + 8 * (num_documents + 1)


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """The counts and hashes of a finished shard; the hashes are BLAKE2b-256 in hexadecimal."""

    documents: int
    tokens: int
    bin_blake2b: str
    idx_blake2b: str


class TokenShardWriter:
    """Writes `prefix`.bin and `prefix`.idx, one sequence a document; both appear when `finish` returns, or neither.

    Used as a context manager, it removes what is not finished. Raises UserError when the folder cannot be written.
    """

    def __init__(self, prefix: str | Path, dtype: str) -> None:
        self._prefix = Path(prefix)
        self._dtype = np.dtype(dtype)
        self._code = next(code for code, name in DTYPES.items() if np.dtype(name) == self._dtype)
        self._lengths = array("i")
        self._bytes = 0
        self._ended = 0  # tokens of the documents that have ended
        self._hash = hashlib.blake2b(digest_size=32)
        self._partial = self._temporary(".bin")
        try:
            self._file = self._partial.open("wb")
        except OSError as error:
            raise _cannot_write(self._prefix, error) from None

    def add(self, tokens: npt.NDArray[np.integer[Any]] | Sequence[int]) -> None:
        """One document's tokens, end of text included. Raises ValueError when one does not fit the type."""
        ids = np.asarray(tokens)
        limits = np.iinfo(self._dtype)
        if len(ids) and not limits.min <= ids.min() <= ids.max() <= limits.max:
            raise ValueError(
                f"ids {ids.min()} to {ids.max()}: {self._dtype} holds {limits.min} to {limits.max}"
            )
        self.write(ids.astype(self._dtype).tobytes(), np.array([len(ids)]))

    def write(self, data: bytes, ends: npt.NDArray[np.integer[Any]]) -> None:
        """Tokens as they stand in the file, and where documents end in `data`, in tokens: the last may go on after it.

        Raises UserError when a document is too long for the format.
        """
        before = self._bytes // self._dtype.itemsize
        self._hash.update(data)
        self._bytes += len(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise _cannot_write(self._prefix, error) from None
        if not len(ends):
            return
        lengths = np.diff(ends + before, prepend=self._ended)
        self._ended = before + int(ends[-1])
        if lengths.max() > np.iinfo(np.int32).max:
            raise UserError(
                f"{self._prefix}: a document of {lengths.max()} tokens is longer than the format allows (2^31 - 1): "
                "split it"
            )
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())

    def finish(self) -> WrittenShard:
        """Both files, complete and on the disk, the index last."""
        lengths = np.frombuffer(self._lengths, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
        assert self._bytes == (int(ends[-1]) if len(ends) else 0), "tokens that belong to no document"
        index = [
            _HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(lengths) + 1),
            lengths.astype("<i4").tobytes(),
            (ends - lengths.astype(np.int64) * self._dtype.itemsize).astype("<i8").tobytes(),
            np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
        ]
        idx_hash = hashlib.blake2b(digest_size=32)
        partial = self._temporary(".idx")
        try:
            sync_file(self._file)
            with partial.open("wb") as file:
                for piece in index:
                    idx_hash.update(piece)
                    file.write(piece)
                sync_file(file)
            self._file.close()
            self._partial.replace(f"{self._prefix}.bin")
            partial.replace(f"{self._prefix}.idx")
            sync(self._prefix.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _cannot_write(self._prefix, error) from None
        tokens = self._bytes // self._dtype.itemsize
        return WrittenShard(len(lengths), tokens, self._hash.hexdigest(), idx_hash.hexdigest())

    def abort(self) -> None:
        """Removes what is not finished. Nothing happens to a finished shard."""
        try:
            self._file.close()
        except OSError:
            pass  # what could not be written on the way is not wanted any more
        self._partial.unlink(missing_ok=True)

    def __enter__(self) -> TokenShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _temporary(self, suffix: str) -> Path:
        return beside(Path(f"{self._prefix}{suffix}"), "partial")


def _cannot_write(prefix: Path, error: OSError) -> UserError:
    return UserError(
        f"{prefix}: cannot be written ({error.strerror or error}): free space there, or name another folder"
    )
