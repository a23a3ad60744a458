"""Parquet, Arrow's own formats, zstd and text columns. The only file that imports pyarrow, when it is needed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mf_train.errors import UserError
from mf_train.text import no_such_column

ArrowError = pa.ArrowException

_BATCH_BYTES = 8 << 20
_ARROW_FILE = b"ARROW1"  # how Arrow's format for files begins


def text_buffers(array: Any) -> tuple[npt.NDArray[np.integer[Any]], memoryview]:
    """Offsets [n + 1] and UTF-8 data of a text array without nulls: value i is data[offsets[i]:offsets[i + 1]].

    Both are views of Arrow's own memory. (Taking the array's element i would copy its text.)
    """
    _, offsets, data = array.buffers()
    width: type[np.signedinteger[Any]] = np.int64 if pa.types.is_large_string(array.type) else np.int32
    wanted = slice(array.offset, array.offset + len(array) + 1)
    return np.frombuffer(offsets, width)[wanted], memoryview(data or b"")


def as_text(column: Any, what: str, key: str) -> Any:
    """A column of any of Arrow's text types, as one whose values have buffers: not copied if it is one already.

    Raises UserError when the type is not text: `what` names the column, `key` the setting.
    """
    types = pa.types
    if types.is_string(column.type) or types.is_large_string(column.type):
        return column
    value_type = column.type.value_type if types.is_dictionary(column.type) else column.type
    if types.is_string(value_type) or types.is_large_string(value_type) or types.is_string_view(value_type):
        return column.cast(pa.large_string())
    raise UserError(f"{what} is {column.type}, not text: set {key} to a text column")


def read_parquet_text(file: BinaryIO, name: str, text_field: str) -> Iterator[bytes | UserError]:
    """The values of one text column as UTF-8, with a UserError in place of each value that is not text.

    Row group by row group, a batch of about 8 MiB at a time: a page is decoded whole, as the format asks.
    Raises UserError (no such column, not text), ArrowError or OSError (damage).
    """
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20) as parquet:
        names = parquet.schema_arrow.names
        if text_field not in names:
            raise UserError(no_such_column(name, text_field, names))
        yield from _values_of(_parquet_batches(parquet, text_field), name, text_field)


def _parquet_batches(parquet: pq.ParquetFile, text_field: str) -> Iterator[Any]:
    for group in range(parquet.num_row_groups):
        batch_size = _rows_of_batch(parquet.metadata.row_group(group), text_field)
        yield from parquet.iter_batches(batch_size, row_groups=[group], columns=[text_field])


def read_arrow_text(file: BinaryIO, name: str, text_field: str) -> Iterator[bytes | UserError]:
    """As `read_parquet_text`, of Arrow's IPC formats: streams, which HF datasets writes, and files.

    A batch of rows is read whole, as it was written.
    """
    reader = pa.ipc.open_stream
    if file.read(len(_ARROW_FILE)) == _ARROW_FILE:
        reader = pa.ipc.open_file
    file.seek(0)
    names = reader(file).schema.names
    if text_field not in names:
        raise UserError(no_such_column(name, text_field, names))
    file.seek(0)
    opened = reader(file, options=pa.ipc.IpcReadOptions(included_fields=[names.index(text_field)]))
    batches = (
        opened if reader is pa.ipc.open_stream else map(opened.get_batch, range(opened.num_record_batches))
    )
    yield from _values_of(batches, name, text_field)


def _values_of(batches: Iterable[Any], name: str, text_field: str) -> Iterator[bytes | UserError]:
    """The values of batches that have the text column alone."""
    row = 0
    for batch in batches:
        column = as_text(batch.column(0), f"{name}: column {text_field!r}", "the source's text_field")
        yield from _utf8_values(column, f"{name}: row", row, text_field)
        row += len(column)


def _rows_of_batch(group: Any, text_field: str) -> int:
    columns = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema == text_field)
    return max(1, min(1024, _BATCH_BYTES * group.num_rows // max(1, size)))


def _utf8_values(column: Any, where: str, row: int, text_field: str) -> Iterator[bytes | UserError]:
    """`row` is the number of the column's first row."""
    values = column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
    valid = _is_valid(column)
    for number, value in enumerate(values, row):
        if value is None:
            yield UserError(f"{where} {number} (counted from 0) has no {text_field!r}: remove it or fill it")
        elif not valid and not _is_utf8(value):
            yield UserError(f"{not_utf8(where, number, text_field)}: convert it")
        else:
            yield value


def rows_not_utf8(column: Any) -> Iterator[int]:
    """The rows of a column of `as_text` whose text is not valid UTF-8. Reads the column once; nothing is copied."""
    row = 0
    for chunk in column.chunks:
        if len(chunk) and not _is_valid(chunk):
            offsets, data = text_buffers(chunk)
            for i, (begin, end) in enumerate(itertools.pairwise(offsets), row):
                if not _is_utf8(data[begin:end]):
                    yield i
        row += len(chunk)


def not_utf8(where: str, row: int, text_field: str) -> str:
    return f"{where} {row} (counted from 0): {text_field!r} is not valid UTF-8"


def _is_valid(column: Any) -> bool:
    try:
        column.validate(full=True)  # Parquet does not promise that its strings are UTF-8
    except pa.ArrowInvalid:
        return False
    return True


def _is_utf8(value: bytes | memoryview) -> bool:
    try:
        str(value, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def open_zstd(file: BinaryIO) -> Any:
    """Decompressed bytes of a .zst file, all its frames. Truncation and damage raise OSError without errno."""
    return pa.input_stream(file, compression="zstd")
