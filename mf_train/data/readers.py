"""Reads the documents of one local file, strictly: the first thing that is wrong is named with its line."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from mf_train.errors import UserError

JSON_LINES = (".jsonl", ".json")
TEXT = (".txt",)
PARQUET = (".parquet",)
COMPRESSED = (".gz", ".zst")  # of JSON Lines and text

KNOWN_FORMATS = ".jsonl, .json (one object a line), .txt (either also .gz or .zst), .parquet"


def file_format(path: Path) -> str | None:
    """The extension that says how `path` is read, without the compression's; None when it is not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    elif suffixes and suffixes[-1] in PARQUET:
        return suffixes[-1]
    return suffixes[-1] if suffixes and suffixes[-1] in JSON_LINES + TEXT else None


def read_documents(file_path: str | Path, text_field: str) -> Iterator[bytes]:
    """The documents of a file in order, as UTF-8.

    JSON Lines: the value of `text_field` of each line's object (blank lines are skipped, other fields may be
    anything). Parquet: the column `text_field`. Plain text: the whole file is one document.
    A byte-order mark at the beginning is dropped; line ends stay as they are.
    Raises UserError naming the file, the line or row, and what is wrong.
    """
    path = Path(file_path)
    kind = file_format(path)
    assert kind is not None
    with _naming_damage(path):
        if kind in PARQUET:
            yield from _read_parquet(path, text_field)
        else:
            with _open_decompressed(path) as file:
                if kind in JSON_LINES:
                    yield from _read_json_lines(path, file, text_field)
                else:
                    yield _read_text(path, file)


def _read_text(path: Path, file: BinaryIO) -> bytes:
    content = file.read().removeprefix(codecs.BOM_UTF8)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _not_utf8(path, line) from None
    return content


def _read_json_lines(path: Path, file: BinaryIO, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield _json_text(path, number, line, text_field)


def _json_text(path: Path, number: int, line: bytes, text_field: str) -> bytes:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _not_utf8(path, number) from None
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply or a number too long")
        raise UserError(
            f"{path}: line {number} is not JSON ({reason}): write one complete object a line"
        ) from None
    if not isinstance(record, dict):
        raise UserError(
            f"{path}: line {number} is {_json_name(record)}, not a JSON object: write one object a line, "
            f'such as {{"{text_field}": "..."}}'
        )
    if text_field not in record:
        keys = ", ".join(map(repr, list(record)[:5])) or "nothing"
        raise UserError(
            f"{path}: line {number} lacks the field {text_field!r} (it has {keys}): "
            "correct the line or set the source's text_field"
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise UserError(
            f"{path}: line {number}: {text_field!r} is {_json_name(text)}, not text: "
            "correct the line or set the source's text_field"
        )
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: line {number}: {text_field!r} holds half of a surrogate pair, not text: correct it"
        ) from None


def _read_parquet(path: Path, text_field: str) -> Iterator[bytes]:
    from mf_train.data.arrow import ArrowError, read_parquet_text

    try:
        yield from read_parquet_text(path, text_field)
    except ArrowError as error:
        raise _bad_parquet(path, error) from None


def _open_decompressed(path: Path) -> BinaryIO:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if suffix == ".zst":
        from mf_train.data.arrow import open_zstd

        return open_zstd(path)
    return path.open("rb")


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns what decompressors and the file system raise into one line that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: truncated or damaged gzip ({_first_line(error)}): copy or compress it again"
        ) from None
    except OSError as error:
        if path.suffix.lower() == ".zst" and error.errno is None:
            raise UserError(
                f"{path}: truncated or damaged zstd ({_first_line(error)}): copy or compress it again"
            ) from None
        if path.suffix.lower() == ".parquet" and error.errno is None:
            raise _bad_parquet(path, error) from None
        raise UserError(f"{path}: cannot be read ({error.strerror or _first_line(error)})") from None


def _bad_parquet(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: damaged or not a Parquet file ({_first_line(error)}): write or copy it again")


def _not_utf8(path: Path, line: int) -> UserError:
    return UserError(
        f"{path}: line {line} is not valid UTF-8: convert the file, for example with iconv -t UTF-8"
    )


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
