"""Safetensors files that several threads write at the same time, each tensor where the layout puts it."""

import io
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from mf_train.checkpoint.safetensors_file import FileLayout
from mf_train.files import path_in_errors, sync_file

SYNC_SECONDS = 0.2


class ShardWriter:
    """Writes new files of the layouts given by name, in any order.

    Leaving the `with` block without an error syncs them; until then a thread syncs now and then, so that the disk works
    while the others compute. Raises OSError naming the file.
    """

    def __init__(self, folder: Path, layouts: Mapping[str, FileLayout]) -> None:
        self._folder = folder
        self._layouts = layouts
        self._files: dict[str, io.FileIO] = {}
        self._error: OSError | None = None
        self._done = threading.Event()
        self._syncing = threading.Thread(target=self._sync_now_and_then, daemon=True)
        for file, layout in layouts.items():
            self._files[file] = open(folder / file, "xb", buffering=0)
            self._write(file, 0, memoryview(layout.header))

    def write(self, file: str, name: str, place: int, data: memoryview) -> None:
        """Write bytes of the tensor `name` of a file; `place` is their distance from the tensor's first byte."""
        self._write(file, self._layouts[file].offsets[name] + place, data)

    def __enter__(self) -> "ShardWriter":
        self._syncing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._syncing.join()
        try:
            if kind is None:
                self._sync()
        finally:
            for file in self._files.values():
                file.close()

    def _sync_now_and_then(self) -> None:
        try:
            while not self._done.wait(SYNC_SECONDS):
                self._sync()
        except OSError as error:
            self._error = error  # the system tells of it once

    def _sync(self) -> None:
        if self._error is not None:
            raise self._error
        for name, file in self._files.items():
            with path_in_errors(self._folder / name):
                sync_file(file)

    def _write(self, file: str, place: int, data: memoryview) -> None:
        while len(data):
            with path_in_errors(self._folder / file):
                count = os.pwrite(self._files[file].fileno(), data, place)
            data, place = data[count:], place + count
