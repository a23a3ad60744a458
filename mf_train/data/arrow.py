"""Arrow: Parquet, zstd and text columns. The only file that imports pyarrow; imported when it is needed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mf_train.errors import UserError

ArrowError = pa.ArrowException


def text_table(documents: list[bytes]) -> Any:
    """A pyarrow Table with one column `text` of UTF-8 documents, which must be valid."""
    return pa.table({"text": pa.array(documents, pa.large_binary()).cast(pa.large_string())})


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


def read_parquet_text(path: Path, text_field: str) -> Iterator[bytes]:
    """The values of one text column, in bounded memory. Raises UserError, ArrowError or OSError (damage)."""
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if text_field not in names:
            columns = ", ".join(map(repr, names[:8]))
            raise UserError(
                f"{path}: has no column {text_field!r} (it has {columns}): set the source's text_field"
            )
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            column = as_text(batch.column(0), f"{path}: column {text_field!r}", "the source's text_field")
            if column.null_count:
                missing = row + pc.index(column.is_null(), True).as_py()
                raise UserError(
                    f"{path}: row {missing} (counted from 0) has no {text_field!r}: remove it or fill it"
                )
            column.validate(full=True)  # Parquet does not promise that its strings are UTF-8
            yield from column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist()
            row += len(column)


def open_zstd(path: Path) -> BinaryIO:
    """Decompressed bytes of a .zst file, all its frames. Truncation and damage raise OSError without errno."""
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
