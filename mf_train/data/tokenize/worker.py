"""A process that prepares text and tokenises ranges of it, and the command's end of the pipes to it.

Frames come back: a kind and a size, then that many bytes.
"""

from __future__ import annotations

import os
import pickle
import signal
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mf_train.config import OnError, SourceConfig
from mf_train.data.documents import TextDocuments, TextSource
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.workers.child import (
    MOST_PIPE_BYTES,
    OTHER_ERROR,
    Child,
    describe_error,
    end_with_the_parent,
    error_of,
)
from mf_train.errors import TrainingError, UserError

if TYPE_CHECKING:
    from mf_train.data.files.input_files import InputFile
    from mf_train.data.text.store import Part

TOKENS, RESULT = 4, 5  # kinds of frames, beside those of errors
_HEADER = struct.Struct("<BQ")
_FRAME_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Prepare:
    """Write the text of some files to `folder`. The result is their `Part`."""

    files: list[InputFile]
    text_field: str
    on_error: OnError
    folder: Path

    def __str__(self) -> str:
        return f"prepared the text of {self.files[0].name}" + (" and others" if len(self.files) > 1 else "")


@dataclass(frozen=True, slots=True)
class Encode:
    """Tokenise documents first ... last - 1. Frames of tokens come first; the result is the lengths, int64."""

    text: Part | SourceConfig  # a part, or a dataset of the hub
    key: str
    on_error: OnError
    first: int
    last: int
    dtype: str

    def __str__(self) -> str:
        where = self.key if isinstance(self.text, SourceConfig) else f"{self.key} ({self.text.text})"
        return f"tokenised documents {self.first} to {self.last - 1} of {where}"


class TokenizeWorker:
    """A running process and the task it has, if any."""

    def __init__(self, tokenizer_path: str) -> None:
        self.task: Prepare | Encode | None = None
        self._child = Child(__name__, MOST_PIPE_BYTES)
        self.process = self._child.process
        self._child.send(tokenizer_path)

    def fileno(self) -> int:
        """Readable when a frame comes."""
        return self._child.output

    def start(self, task: Prepare | Encode) -> None:
        """Give a task to a process that has none."""
        assert self.task is None
        self.task = task
        self._child.send(task)

    def read(self) -> tuple[int, bytes]:
        """The next frame of the task: TOKENS or, when it is done, RESULT.

        Raises what the task raised (UserError, OSError), and TrainingError when the process has died.
        """
        kind, size = _HEADER.unpack(self._read_exactly(_HEADER.size))
        content = self._read_exactly(size)
        if kind == TOKENS:
            return kind, content
        if kind == RESULT:
            self.task = None
            return kind, content
        text = content.decode("utf-8")
        raise error_of(
            kind, f"a process failed while it {self.task}:\n{text}" if kind == OTHER_ERROR else text
        )

    def close(self) -> None:
        """End the process, whatever it does."""
        self._child.close(patience=0.0)

    def _read_exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = os.read(self._child.output, size - len(content))
            if not piece:
                raise self._death()
            content += piece
        return bytes(content)

    def _death(self) -> TrainingError:
        status = self.process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return TrainingError(
            f"process {self.process.pid} {how}{hint} while it {self.task}: finished shards are kept; "
            "run the command again to go on"
        )


def main(frames: int) -> None:
    """The process: tasks until standard input closes, their frames into the pipe `frames`."""
    tasks = sys.stdin.buffer
    tokenizer_path: str = pickle.load(tasks)
    end_with_the_parent()
    with open(frames, "wb", _FRAME_BYTES) as output:
        worker = _Worker(output, tokenizer_path)
        while True:
            try:
                task = pickle.load(tasks)
            except EOFError:
                return
            worker.run(task)


class _Worker:
    def __init__(self, output: BinaryIO, tokenizer_path: str) -> None:
        self._output = output
        self._tokenizer_path = tokenizer_path
        self._tokenizer: Tokenizer | None = None
        self._opened: tuple[Part | SourceConfig, TextSource] | None = None

    def run(self, task: Prepare | Encode) -> None:
        try:
            result = _prepare(task) if isinstance(task, Prepare) else self._encode(task)
        except Exception as error:
            kind, text = describe_error(error)
            self._send(kind, text.encode("utf-8"))
        else:
            self._send(RESULT, result)

    def _encode(self, task: Encode) -> bytes:
        source = self._open(task)
        lengths = np.zeros(task.last - task.first, np.int64)
        held: list[bytes] = []
        size = 0
        for document in range(task.first, task.last):
            index, start = 0, 0
            while index == 0:
                chunk = source.read([document], start, 1)  # a segment, as in training
                index, start = chunk.end
                lengths[document - task.first] += len(chunk.tokens)
                held.append(chunk.tokens.astype(task.dtype).tobytes())
                size += len(held[-1])
                if size >= _FRAME_BYTES:
                    self._send(TOKENS, b"".join(held))
                    held, size = [], 0
        self._send(TOKENS, b"".join(held))
        return lengths.tobytes()

    def _open(self, task: Encode) -> TextSource:
        if self._opened is None or self._opened[0] != task.text:
            self._tokenizer = self._tokenizer or Tokenizer(self._tokenizer_path)
            self._opened = (
                task.text,
                TextSource(open_prepared(task.text, task.on_error, task.key), self._tokenizer),
            )
        return self._opened[1]

    def _send(self, kind: int, content: bytes) -> None:
        self._output.write(_HEADER.pack(kind, len(content)))
        self._output.write(content)
        self._output.flush()


def open_prepared(text: Part | SourceConfig, on_error: OnError, key: str) -> TextDocuments:
    """The documents of a prepared part, or of a dataset of the hub."""
    if isinstance(text, SourceConfig):
        from mf_train.data.text.hub import open_hub

        return open_hub(text, on_error, key)
    from mf_train.data.text.store import StoredDocuments

    return StoredDocuments(key, [text], 1)


def _prepare(task: Prepare) -> bytes:
    from mf_train.data.text.store import prepare_part

    try:
        return pickle.dumps(prepare_part(task.files, task.text_field, task.on_error, task.folder))
    except UserError as error:
        if isinstance(error.__cause__, OSError) and str(task.folder) in str(error):  # not data.cache's
            reason = error.__cause__.strerror
            raise UserError(
                f"{task.folder}: cannot be written ({reason}): free space there, or name another folder"
            ) from None
        raise
