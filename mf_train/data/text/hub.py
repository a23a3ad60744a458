"""A dataset of the Hugging Face hub as documents, in place. The only file that imports HF `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np

from mf_train.config import OnError, SourceConfig
from mf_train.data.documents import TextDocuments
from mf_train.data.text.arrow import as_text, not_utf8, rows_not_utf8, text_buffers
from mf_train.errors import UserError
from mf_train.text import no_such_column


class HubDocuments(TextDocuments):
    """The documents of a text column of Arrow arrays (memory-mapped, not copied), but for empty ones and `bad_rows`."""

    files = 0

    def __init__(self, name: str, chunks: Sequence[Any], bad_rows: Sequence[int] = ()) -> None:
        self.name = name
        self.opened_by: tuple[Any, ...] | None = None  # the arguments of `open_hub`
        self.skipped: dict[str, int] = {}
        self._chunks = [text_buffers(chunk) for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([0, *(len(offsets) - 1 for offsets, _ in self._chunks)], dtype=np.int64)
        self.num_bytes = sum(int(offsets[-1]) - int(offsets[0]) for offsets, _ in self._chunks)
        empty = [
            np.flatnonzero(offsets[1:] == offsets[:-1]) + begin
            for (offsets, _), begin in zip(self._chunks, self._ends, strict=False)
        ]
        for row in bad_rows:
            _, begin, end = self._find_row(row)
            self.num_bytes -= end - begin
        rows = np.sort(np.concatenate([np.array(bad_rows, np.int64), *empty]))
        self._before_left_out = rows - np.arange(len(rows))  # documents before each row that is left out

    def __reduce__(self) -> tuple[Any, ...]:
        assert self.opened_by is not None
        return open_hub, self.opened_by  # another process maps the same arrays, and need not check them

    def __len__(self) -> int:
        return int(self._ends[-1]) - len(self._before_left_out)

    def _find(self, i: int) -> tuple[memoryview, int, int]:
        return self._find_row(i + int(np.searchsorted(self._before_left_out, i, side="right")))

    def _find_row(self, row: int) -> tuple[memoryview, int, int]:
        chunk = int(np.searchsorted(self._ends, row, side="right")) - 1
        offsets, data = self._chunks[chunk]
        local = row - int(self._ends[chunk])
        return data, int(offsets[local]), int(offsets[local + 1])

    def _read(self, where: memoryview, begin: int, end: int) -> bytes:
        return bytes(where[begin:end])


def open_hub(
    source: SourceConfig, on_error: OnError, key: str, not_utf8_rows: Sequence[int] | None = None
) -> HubDocuments:
    """The text column of a hub dataset. Raises UserError when it cannot be had or is not text.

    Rows without a text, or whose text is not UTF-8, are refused, or left out and counted (`on_error` "skip"). The
    column is read once to find the latter, unless they are given.
    """
    what = f"{key}.hub: {source.hub}"
    with _quiet_unless_interactive():
        try:
            dataset = datasets.load_dataset(source.hub, source.hub_config, split=source.split)
        except Exception as error:  # datasets, huggingface_hub and their HTTP clients raise dozens of types
            reason = (str(error).splitlines() or [type(error).__name__])[0][:300].rstrip(".")
            raise UserError(
                f"{what} (configuration {source.hub_config or 'default'}, split {source.split}) cannot be "
                f"loaded: {reason}; check the name, hub_config, split and the network"
            ) from error
    if source.text_field not in dataset.column_names:
        raise UserError(no_such_column(what, source.text_field, dataset.column_names, f"{key}.text_field"))
    column = dataset.data.column(source.text_field)
    column = as_text(column, f"{what}: column {source.text_field!r}", f"{key}.text_field")
    if column.null_count and on_error == "raise":
        raise UserError(
            f"{what}: {column.null_count} rows have no {source.text_field!r}: filter them out first, or set "
            "data.on_error=skip"
        )
    if not_utf8_rows is None:
        not_utf8_rows = []
        for row in rows_not_utf8(column):
            if on_error == "raise":
                raise UserError(
                    f"{not_utf8(f'{what}: row', row, source.text_field)}: convert it, or set data.on_error=skip"
                )
            not_utf8_rows.append(row)
    # a null has no bytes: an empty document
    documents = HubDocuments(str(source.hub), column.chunks, not_utf8_rows)
    documents.opened_by = (source, on_error, key, not_utf8_rows)
    if skipped := column.null_count + len(not_utf8_rows):
        documents.skipped[documents.name] = skipped
    return documents


@contextmanager
def _quiet_unless_interactive() -> Iterator[None]:
    """Progress bars of `datasets` only on a terminal; its state is put back."""
    if sys.stderr.isatty() or datasets.utils.are_progress_bars_disabled():
        yield
        return
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.enable_progress_bars()
