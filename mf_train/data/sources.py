"""Sources of documents: local files or a dataset of the hub, with random access to every document."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mf_train.config import SourceConfig
from mf_train.data.readers import KNOWN_FORMATS, file_format
from mf_train.errors import UserError

_FINGERPRINT_SAMPLES = 64


class Documents:
    """The documents of one source in order: `len(documents)`, `documents[i]` -> str. Memory-mapped.

    `name` is what the configuration calls the source, `chunks` its text as Arrow arrays, `files` its local
    files (none for the hub).
    """

    def __init__(self, name: str, chunks: Sequence[Any], files: tuple[Path, ...] = ()) -> None:
        from mf_train.data.arrow import text_buffers

        self.name = name
        self.files = files
        self._chunks = [text_buffers(chunk) for chunk in chunks if len(chunk)]
        self._ends = np.cumsum([len(offsets) - 1 for offsets, _ in self._chunks], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> str:
        return bytes(self.utf8(i)).decode("utf-8")

    def utf8(self, i: int) -> memoryview:
        """The UTF-8 bytes of document i, not copied. Raises IndexError outside [0, len)."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name} has {len(self)} documents: there is no document {i}")
        chunk = int(np.searchsorted(self._ends, i, side="right"))
        offsets, data = self._chunks[chunk]
        local = i - (int(self._ends[chunk - 1]) if chunk else 0)
        return data[int(offsets[local]) : int(offsets[local + 1])]

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return sum(int(offsets[-1]) - int(offsets[0]) for offsets, _ in self._chunks)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the number of documents, their bytes and a sample of them: cheap, not a full hash.

        It depends on the content only: moving, compressing or re-sharding the files does not change it.
        """
        digest = hashlib.blake2b(f"{len(self)} {self.num_bytes}".encode("ascii"), digest_size=8)
        samples = min(len(self), _FINGERPRINT_SAMPLES)
        for sample in range(samples):  # the first, the last and evenly between
            utf8 = self.utf8(sample * (len(self) - 1) // max(1, samples - 1))
            digest.update(len(utf8).to_bytes(8, "little"))
            digest.update(utf8[:4096])
        return digest.hexdigest()


def open_source(source: SourceConfig, key: str) -> Documents:
    """Open a source; `key` (such as `data.train[0]`) is named in errors.

    The first opening reads every document into the Arrow cache of `datasets` (HF_HOME), checking all of
    them; later ones map the cache. Raises UserError naming the file, line and remedy.
    """
    from mf_train.data.documents_cache import open_files, open_hub

    if source.hub is not None:
        documents = Documents(source.hub, open_hub(source, key))
    else:
        files = find_files(source.path or "", key)
        documents = Documents(str(source.path), open_files(files, source.text_field), tuple(files))
    if not len(documents):
        raise UserError(f"{key}: {documents.name} holds no documents: remove the source or fill it")
    return documents


def find_files(path: str, key: str) -> list[Path]:
    """Sorted files that a `path` means: a file, a folder (its known files, recursively) or a glob (also `**`).

    Raises UserError when there is none or a named file's format is not known.
    """
    expanded = Path(path).expanduser()
    if expanded.is_dir():
        inside = (file.relative_to(expanded) for file in expanded.rglob("*") if file.is_file())
        visible = sorted(file for file in inside if not any(part.startswith(".") for part in file.parts))
        found = [expanded / file for file in visible if file_format(file)]
        if not found:
            raise UserError(f"{key}: folder {path} has no file of a known format: it needs {KNOWN_FORMATS}")
        return found
    if expanded.is_file():
        found = [expanded]
    elif glob.has_magic(path):
        found = sorted(file for file in map(Path, glob.glob(str(expanded), recursive=True)) if file.is_file())
        if not found:
            raise UserError(
                f"{key}: no file matches {path}: check the pattern and the working folder {Path.cwd()}"
            )
    else:
        raise UserError(f"{key}: {path} does not exist: check the path and the working folder {Path.cwd()}")
    for file in found:
        if file_format(file) is None:
            raise UserError(f"{key}: {file} is not of a known format: use {KNOWN_FORMATS}")
    return found
