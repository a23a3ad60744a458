"""Reads the documents of one file, strictly and in bounded memory: what is wrong is named with its line."""

from __future__ import annotations

import bz2
import codecs
import csv
import errno
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

from mf_train.data.files.input_files import (
    ARROW,
    CSV,
    JSON_LINES,
    InputFile,
    UnreadableFileError,
    compression,
    file_format,
)
from mf_train.errors import UserError
from mf_train.text import first_line, no_such_column

LONGEST_LINE_BYTES = 256_000_000  # of JSON: parsing a line takes some ten times the memory of its text
PIECE_BYTES = 1 << 20  # of plain text, which is read in pieces
_DAMAGE_BYTES = 1 << 16  # text before a damaged place that may be lost with it (zstd)
# of xz and bzip2, read at once: their text may be lost with a damaged place in them
_COMPRESSED_BYTES = 1 << 13


class Sink(Protocol):
    """Where documents go, in pieces."""

    def write(self, piece: bytes) -> None:
        """More UTF-8 of the current document; complete characters only from `end` to `end`."""

    def end(self) -> None:
        """The current document is complete."""

    def bad(self, error: UserError) -> None:
        """Leave out the current document, and what was written of it, or raise the error."""


class DamagedFileError(UserError):
    """A file whose content is damaged, or which is gone."""


def read_documents(file: InputFile, text_field: str, sink: Sink) -> None:
    """Hand the documents of a file to `sink` in order, as UTF-8.

    JSON Lines: the value of `text_field` of each line's object (blank lines are skipped, other fields may be
    anything). CSV and TSV, whose first line names the columns, Parquet and Arrow: the column `text_field`. Plain text:
    the whole file is one document.
    A byte-order mark at the beginning is dropped; line ends stay as they are.

    Memory does not depend on the length of a text; a line of JSON is parsed as a whole and has at most 256 MB, its
    end of line counted; a value of Parquet is decoded with its page, one of Arrow with its batch of rows.
    `sink.bad` gets a UserError for every wrong line or row, naming the file, the line and what is wrong, and one
    for the rest of a truncated or damaged file, or one that is gone. What is no fault of the file is raised, whatever
    `sink.bad` does: UserError when it may not be read or changes meanwhile, OSError when the machine fails (after
    retries, or out of memory or descriptors).
    """
    try:
        with _damage_errors(file.name):
            with file.open() as raw:
                kind = file_format(file.name)
                if kind in ARROW:
                    _read_arrow(file.name, raw, text_field, sink)
                elif kind in CSV:
                    _read_csv(file.name, _decompressed(file.name, raw), text_field, sink)
                elif kind in JSON_LINES:
                    _read_json_lines(file.name, _decompressed(file.name, raw), text_field, sink)
                else:
                    _read_text(file.name, _decompressed(file.name, raw), sink)
    except DamagedFileError as error:
        sink.bad(error)


# Plain text ----------------------------------------------------------------------------------------------------------


def _read_text(name: str, file: BinaryIO, sink: Sink) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines, first = 1, True
    while True:
        piece = file.read(PIECE_BYTES)
        content = piece.removeprefix(codecs.BOM_UTF8) if first else piece
        try:
            decoder.decode(content, final=not piece)
        except UnicodeDecodeError as error:
            raise DamagedFileError(
                _not_utf8(name, lines + error.object.count(b"\n", 0, error.start))
            ) from None
        if not piece:
            sink.end()
            return
        sink.write(content)
        lines += content.count(b"\n")
        first = False


# JSON Lines ----------------------------------------------------------------------------------------------------------


def _read_json_lines(name: str, file: BinaryIO, text_field: str, sink: Sink) -> None:
    number = 0
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        where = f"{name}: line {number}"
        if len(line) > LONGEST_LINE_BYTES:
            _skip_line(line, file)
            remedy = "split its document into several lines, or write its text to a .txt file"
            most = f"{LONGEST_LINE_BYTES / 1e6:g} MB, the most for a line of JSON"
            sink.bad(UserError(f"{where} is longer than {most}: {remedy}, which may have any length"))
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.lstrip().startswith(b"["):
                raise DamagedFileError(
                    f"{name}: is a JSON array, not JSON Lines: write one object a line, as jq -c '.[]' does"
                )
        if not line.strip():
            continue
        try:
            text = _json_text(where, line, text_field)
        except UnicodeDecodeError:
            sink.bad(UserError(_not_utf8(name, number)))
        except UserError as error:
            sink.bad(error)
        else:
            sink.write(text)
            sink.end()


def _skip_line(piece: bytes, file: BinaryIO) -> None:
    """Reads to the end of the line that begins with `piece`."""
    while piece and not piece.endswith(b"\n"):
        piece = file.readline(PIECE_BYTES)


def _json_text(where: str, line: bytes, text_field: str) -> bytes:
    """The text of a line. Raises UserError and UnicodeDecodeError."""
    utf8 = line.decode("utf-8")
    try:
        record = json.loads(utf8)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply or a number too long")
        raise UserError(f"{where} is not JSON ({reason}): write one complete object a line") from None
    if not isinstance(record, dict):
        raise UserError(
            f"{where} is {_json_name(record)}, not a JSON object: write one object a line, such as "
            f'{{"{text_field}": "..."}}'
        )
    remedy = "correct the line or set the source's text_field"
    if text_field not in record:
        shown = ", ".join(repr(key[:80]) for key in list(record)[:5]) or "nothing"
        raise UserError(f"{where} lacks the field {text_field!r} (it has {shown}): {remedy}")
    value = record[text_field]
    if not isinstance(value, str):
        raise UserError(f"{where}: {text_field!r} is {_json_name(value)}, not text: {remedy}")
    try:
        return value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {text_field!r} holds half of a surrogate pair, not text: correct it"
        ) from None


# CSV and TSV ---------------------------------------------------------------------------------------------------------


def _read_csv(name: str, file: BinaryIO, text_field: str, sink: Sink) -> None:
    csv.field_size_limit(LONGEST_LINE_BYTES)
    delimiter = "\t" if file_format(name) == ".tsv" else ","
    rows = csv.reader(_decoded_lines(name, file), delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [text_field])
        if text_field not in columns:
            raise DamagedFileError(no_such_column(name, text_field, columns))
        place = columns.index(text_field)
        for row in rows:
            if len(row) == len(columns):
                sink.write(row[place].encode())
                sink.end()
            elif row:  # else a blank line
                sink.bad(
                    UserError(
                        f"{name}: line {rows.line_num} has {len(row)} columns, the first line {len(columns)}: put "
                        "values that hold the delimiter or a line end in double quotes"
                    )
                )
    except csv.Error as error:
        raise DamagedFileError(
            f"{name}: line {rows.line_num} is not CSV ({error}): put values that hold the delimiter, a line end or "
            "double quotes, which are doubled, in double quotes"
        ) from None


def _decoded_lines(name: str, file: BinaryIO) -> Iterator[str]:
    number = 0
    while line := file.readline(LONGEST_LINE_BYTES + 1):
        number += 1
        if len(line) > LONGEST_LINE_BYTES:
            raise DamagedFileError(
                f"{name}: line {number} is longer than {LONGEST_LINE_BYTES / 1e6:g} MB, the most for a line of CSV"
            )
        try:
            yield (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError:
            raise DamagedFileError(_not_utf8(name, number)) from None


# Parquet, Arrow and compression --------------------------------------------------------------------------------------


def _read_arrow(name: str, raw: BinaryIO, text_field: str, sink: Sink) -> None:
    for value in _arrow_values(name, raw, text_field):
        if isinstance(value, UserError):
            sink.bad(value)
        else:
            sink.write(value)
            sink.end()


def _arrow_values(name: str, raw: BinaryIO, text_field: str) -> Iterator[bytes | UserError]:
    from mf_train.data.text.arrow import ArrowError, read_arrow_text, read_parquet_text

    read = read_parquet_text if file_format(name) == ".parquet" else read_arrow_text
    try:
        yield from read(raw, name, text_field)
    except (UnreadableFileError, MemoryError):  # Arrow's own is an ArrowError, too
        raise
    except UserError as error:
        raise DamagedFileError(str(error)) from None
    except ArrowError as error:
        raise _bad_arrow(name, error) from None


def _decompressed(name: str, raw: BinaryIO) -> BinaryIO:
    if opened := _BY_PYTHON.get(compression(name) or ""):
        return io.BufferedReader(_Decompressed(opened(raw)), PIECE_BYTES)
    if compression(name) == ".zst":
        from mf_train.data.text.arrow import open_zstd

        return io.BufferedReader(open_zstd(raw), _DAMAGE_BYTES)
    return raw


class _Streams:
    """The streams of a bzip2 or xz file, one after another; what is no stream raises OSError or LZMAError.

    bz2.BZ2File and lzma.LZMAFile take damage at the beginning of a later stream for the end of the file.
    """

    def __init__(
        self, file: BinaryIO, begin: type[bz2.BZ2Decompressor] | type[lzma.LZMADecompressor]
    ) -> None:
        self._file = file
        self._begin = begin
        self._stream = begin()

    def read1(self, size: int) -> bytes:
        """At most `size` bytes, b"" at the end. Raises EOFError where the file ends inside a stream."""
        while True:
            compressed = b""
            if self._stream.eof:
                compressed = self._after_stream(self._stream.unused_data)
                if not compressed:
                    return b""
                self._stream = self._begin()
            elif self._stream.needs_input:
                compressed = self._file.read(_COMPRESSED_BYTES)
                if not compressed:
                    raise EOFError("the file ends inside a stream")
            if data := self._stream.decompress(compressed, size):
                return data

    def _after_stream(self, rest: bytes) -> bytes:
        """The beginning of the next stream, without the zeros that xz allows before it; b"" at the end."""
        zeros = 0
        while compressed := rest or self._file.read(_COMPRESSED_BYTES):
            rest = compressed.lstrip(b"\0") if self._begin is lzma.LZMADecompressor else compressed
            zeros += len(compressed) - len(rest)
            if rest:
                break
        if zeros % 4:  # section 2.2 of the format
            raise lzma.LZMAError(f"{zeros} zero bytes after a stream, not a multiple of 4")
        return rest


_BY_PYTHON: dict[str, Callable[[BinaryIO], gzip.GzipFile | _Streams]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw, mode="rb"),
    ".xz": lambda raw: _Streams(raw, lzma.LZMADecompressor),
    ".bz2": lambda raw: _Streams(raw, bz2.BZ2Decompressor),
}


class _Decompressed(io.RawIOBase):
    """Decompressed bytes, all of them that come before a damaged place (a GzipFile may drop the last it read)."""

    def __init__(self, file: gzip.GzipFile | _Streams) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


# What goes wrong -----------------------------------------------------------------------------------------------------


@contextmanager
def _damage_errors(name: str) -> Iterator[None]:
    """Turns what decoders and the file system raise into one line that names the file.

    Only damage and a file that is gone are DamagedFileErrors: what another try may read must not be left out.
    """
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _bad_compression(name, error) from None
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), name) from error
    except FileNotFoundError as error:
        raise DamagedFileError(
            f"{name}: cannot be read ({error.strerror or first_line(error)[:200]})"
        ) from None
    except PermissionError as error:
        raise UserError(
            f"{name}: cannot be read ({error.strerror or first_line(error)[:200]}): "
            "give this user the right to read it, or renew its credentials"
        ) from None
    except OSError as error:
        if type(error) is OSError and error.errno is None:  # a decoder's: files' errors have a number
            if compression(name) == ".zst" and "too much memory" in str(error):
                raise UnreadableFileError(
                    f"{name}: its zstd window is larger than 128 MiB, the most that is read: compress it again with "
                    "--long=27 or less"
                ) from None
            if compression(name):
                raise _bad_compression(name, error) from None
            if file_format(name) in ARROW:
                raise _bad_arrow(name, error) from None
        if error.errno is None or error.filename is None:
            raise OSError(
                error.errno or errno.EIO, error.strerror or first_line(error)[:200], name
            ) from error
        raise


def _bad_compression(name: str, error: Exception) -> DamagedFileError:
    kind = {".gz": "gzip", ".zst": "zstd", ".xz": "xz", ".bz2": "bzip2"}[compression(name) or ""]
    reason = first_line(error)[:200]
    return DamagedFileError(f"{name}: truncated or damaged {kind} ({reason}): copy or compress it again")


def _bad_arrow(name: str, error: Exception) -> DamagedFileError:
    kind = "a Parquet" if file_format(name) == ".parquet" else "an Arrow"
    return DamagedFileError(
        f"{name}: damaged or not {kind} file ({first_line(error)[:200]}): write or copy it again"
    )


def _not_utf8(name: str, line: int) -> str:
    return f"{name}: line {line} is not valid UTF-8: convert the file, for example with iconv -t UTF-8"


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
