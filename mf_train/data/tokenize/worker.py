"""Processes that prepare text and tokenise ranges of it, and the command's end of the pipes to them."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

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

_RESULT = 0  # a kind of answer, beside those of errors


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
    """Tokenise text from one place to another, each a document and a byte between two of its segments.

    The result is `Encoded`.
    """

    text: Part | SourceConfig  # a part, or a dataset of the hub
    key: str
    on_error: OnError
    begin: tuple[int, int]
    end: tuple[int, int]
    dtype: str

    def __str__(self) -> str:
        where = self.key if isinstance(self.text, SourceConfig) else f"{self.key} ({self.text.text})"
        last = self.end[0] if self.end[1] else self.end[0] - 1
        return f"tokenised documents {self.begin[0]} to {last} of {where}"


class Encoded(NamedTuple):
    """The bytes of a shard, and where documents end in them: in tokens, int64."""

    tokens: bytes
    ends: npt.NDArray[np.int64]


class Workers:
    """`count` processes that work on tasks, each for a thread that waits for it. They start with the first task."""

    def __init__(self, count: int, tokenizer: Tokenizer) -> None:
        self.count = count
        self._tokenizer = tokenizer
        self._children: list[Child] = []
        self._idle: SimpleQueue[Child] = SimpleQueue()
        self._threads = ThreadPoolExecutor(count)

    def submit(self, task: Prepare | Encode) -> Future[Any]:
        """The task's result, once it is there.

        The future raises what the task raised (UserError, OSError), and TrainingError when its process has died.
        """
        while len(self._children) < self.count:
            child = Child(__name__, MOST_PIPE_BYTES)
            self._children.append(child)
            child.send(self._tokenizer)
            self._idle.put(child)
        return self._threads.submit(self._run, task)

    def close(self) -> None:
        """End the processes, whatever they do."""
        for child in self._children:
            child.process.kill()  # which ends the waiting of its thread
        self._threads.shutdown(cancel_futures=True)
        for child in self._children:
            child.close(patience=0.0)

    def _run(self, task: Prepare | Encode) -> Any:
        child = self._idle.get()
        try:
            child.send(task)
            kind, content = child.answers.recv()
        except (EOFError, OSError):  # the end of the pipe, between two answers or within one
            raise _death(child.process, task) from None
        finally:
            self._idle.put(child)
        if kind == OTHER_ERROR:
            content = f"a process failed while it {task}:\n{content}"
        if kind != _RESULT:
            raise error_of(kind, content)
        return content


def _death(process: subprocess.Popen[bytes], task: Prepare | Encode) -> TrainingError:
    status = process.wait()
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    hint = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
    return TrainingError(
        f"process {process.pid} {how}{hint} while it {task}: finished shards are kept; "
        "run the command again to go on"
    )


def main(answers: int) -> None:
    """The process: tasks until standard input closes, the answer to each into the pipe `answers`."""
    tasks = sys.stdin.buffer
    tokenizer: Tokenizer = pickle.load(tasks)
    end_with_the_parent()
    encoder = _Encoder(tokenizer)
    with Connection(answers, readable=False) as pipe:
        while True:
            try:
                task = pickle.load(tasks)
            except EOFError:
                return
            answer: tuple[int, Any]
            try:
                answer = (_RESULT, _prepare(task) if isinstance(task, Prepare) else encoder.encode(task))
            except Exception as error:
                answer = describe_error(error)
            pipe.send(answer)


class _Encoder:
    """Keeps the text that was used last open."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._opened: tuple[Part | SourceConfig, TextSource] | None = None

    def encode(self, task: Encode) -> Encoded:
        source = self._open(task)
        pieces, ends, size = [], [], 0
        document, start = task.begin
        while (document, start) < task.end:
            chunk = source.read([document], start, 1)  # a segment, as in training
            pieces.append(chunk.tokens.astype(task.dtype).tobytes())
            size += len(chunk.tokens)
            finished, start = chunk.end
            if finished:
                document += 1
                ends.append(size)
        return Encoded(b"".join(pieces), np.array(ends, np.int64))

    def _open(self, task: Encode) -> TextSource:
        if self._opened is None or self._opened[0] != task.text:
            documents = open_prepared(task.text, task.on_error, task.key)
            self._opened = task.text, TextSource(documents, self._tokenizer)
        return self._opened[1]


def open_prepared(text: Part | SourceConfig, on_error: OnError, key: str) -> TextDocuments:
    """The documents of a prepared part, or of a dataset of the hub."""
    if isinstance(text, SourceConfig):
        from mf_train.data.text.hub import open_hub

        return open_hub(text, on_error, key)
    from mf_train.data.text.store import StoredDocuments

    return StoredDocuments(key, [text], 1)


def _prepare(task: Prepare) -> Part:
    from mf_train.data.text.store import prepare_part

    try:
        return prepare_part(task.files, task.text_field, task.on_error, task.folder)
    except UserError as error:
        if isinstance(error.__cause__, OSError) and str(task.folder) in str(error):  # not data.cache's
            reason = error.__cause__.strerror
            raise UserError(
                f"{task.folder}: cannot be written ({reason}): free space there, or name another folder"
            ) from None
        raise
