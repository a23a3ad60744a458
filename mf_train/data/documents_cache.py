"""Documents as a memory-mapped Arrow column, kept by HF `datasets`. The only file that imports it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.builder import Key

from mf_train.config import SourceConfig
from mf_train.data.arrow import as_text, text_table
from mf_train.data.readers import read_documents
from mf_train.errors import UserError

_TABLE_BYTES = 16 << 20
_READER_VERSION = "1"  # raise it when the same files give other documents: old caches are then not used


@dataclass
class DocumentsConfig(datasets.BuilderConfig):
    """What the cache is keyed by: every file's path, size and time of change, and the field."""

    files: tuple[tuple[str, int, int], ...] = ()
    text_field: str = "text"
    reader: str = _READER_VERSION


class DocumentsBuilder(datasets.ArrowBasedBuilder):
    """Local files to one `text` column.

    The packaged json builder is not used: it guesses types, reads agent traces and JSON arrays as something
    else, casts numbers to text and fills what is missing with null. Only the text is read here, strictly.
    """

    BUILDER_CONFIG_CLASS = DocumentsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features({"text": datasets.Value("large_string")}))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        paths = [path for path, _, _ in self.config.files]
        return [datasets.SplitGenerator(name="train", gen_kwargs={"paths": paths})]

    def _generate_tables(self, paths: list[str]) -> Iterator[tuple[Key, Any]]:
        # paths are text here: `datasets` replaces open and Path of a builder's module by its own
        documents: list[bytes] = []
        size = number = 0
        for path in paths:
            for document in read_documents(path, self.config.text_field):
                documents.append(document)
                size += len(document)
                # at least two: datasets holds back up to a thousand tables of one row in memory
                if size >= _TABLE_BYTES and len(documents) >= 2:
                    yield Key(0, number), text_table(documents)
                    documents, size, number = [], 0, number + 1
        if documents:
            yield Key(0, number), text_table(documents)


def open_files(paths: list[Path], text_field: str) -> list[Any]:
    """Arrow arrays of the documents of local files, in order; kept in the cache of `datasets` (HF_HOME).

    Several processes may open the same files at once: one reads, the others wait for its lock.
    Raises UserError as `read_documents` does, or when the cache cannot be written.
    """
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    with _quiet_unless_interactive():
        try:
            builder = DocumentsBuilder(files=tuple(stats), text_field=text_field)
            builder.download_and_prepare(verification_mode="no_checks")
            if not builder.info.splits["train"].num_examples:
                return []  # of which datasets makes no Dataset
            dataset = builder.as_dataset(split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError):
                raise _cache_error(cause) from None
            raise cause from None
        except OSError as error:
            raise _cache_error(error) from None
    return list(dataset.data.column("text").chunks)


def open_hub(source: SourceConfig, key: str) -> list[Any]:
    """Arrow arrays of the text column of a hub dataset. Raises UserError when it cannot be had or is not text."""
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
        columns = ", ".join(map(repr, dataset.column_names[:8]))
        raise UserError(
            f"{what}: has no column {source.text_field!r} (it has {columns}): set {key}.text_field"
        )
    column = dataset.data.column(source.text_field)
    column = as_text(column, f"{what}: column {source.text_field!r}", f"{key}.text_field")
    if column.null_count:
        raise UserError(
            f"{what}: {column.null_count} rows have no {source.text_field!r}: filter them out first"
        )
    return list(column.chunks)


def _cache_error(error: OSError) -> UserError:
    return UserError(
        f"the cache of documents {datasets.config.HF_DATASETS_CACHE} cannot be used "
        f"({error.strerror or error}): set HF_HOME to a folder with enough free space"
    )


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
