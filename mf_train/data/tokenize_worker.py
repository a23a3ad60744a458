"""A process that prepares text and tokenises ranges of it, and the command's end of the pipes to it.

Tasks go in by standard input, pickled; frames come back by standard output: a kind and a size, then that many
bytes. The pipes are all that the two share: nothing stays behind when either is killed, and each notices at once.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mf_train.config import OnError, SourceConfig
from mf_train.data.documents import Documents, TextSource
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import TrainingError, UserError

if TYPE_CHECKING:
    from mf_train.data.files import InputFile
    from mf_train.data.text_store import Part

TOKENS, RESULT, _USER_ERROR, _OS_ERROR, _OTHER_ERROR = range(5)
_HEADER = struct.Struct("<BQ")
_FRAME_BYTES = 1 << 18
_PIPE_BYTES = 1 << 20  # the most that Linux gives without privileges

# -P keeps the working folder off the path until the command's own path is there.
_COMMAND = """\
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
from mf_train.data.tokenize_worker import main
main()
"""


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
        # An interrupt at the terminal reaches all processes; the command alone decides, and they end with it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        with suppress(PermissionError, AttributeError):  # many pipes of this user, or not Linux
            fcntl.fcntl(self._stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._send([os.path.abspath(entry) for entry in sys.path])
        self._send(tokenizer_path)

    def fileno(self) -> int:
        """Readable when a frame comes."""
        return self._stdout.fileno()

    def start(self, task: Prepare | Encode) -> None:
        """Give a task to a process that has none."""
        assert self.task is None
        self.task = task
        self._send(task)

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
        raise {_USER_ERROR: UserError, _OS_ERROR: OSError}.get(kind, TrainingError)(content.decode("utf-8"))

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._stdin.close()
        self._stdout.close()
        self._process.wait()

    def _send(self, message: Any) -> None:
        content = memoryview(pickle.dumps(message))
        with suppress(BrokenPipeError):  # it died: `read` says so
            while content:
                content = content[self._stdin.write(content) :]

    def _read_exactly(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = self._stdout.read(size - len(content))
            if not piece:
                raise self._death()
            content += piece
        return bytes(content)

    def _death(self) -> TrainingError:
        status = self._process.wait()
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = ", as the system does when memory runs out" if status == -signal.SIGKILL else ""
        return TrainingError(
            f"process {self._process.pid} {how}{hint} while it {self.task}: finished shards are kept; "
            "run the command again to go on"
        )


def main() -> None:
    """The process: tasks until the pipe closes."""
    tasks = sys.stdin.buffer
    output = os.fdopen(os.dup(1), "wb", _FRAME_BYTES)
    os.dup2(2, 1)  # what libraries print is no frame
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    worker = _Worker(output, pickle.load(tasks))
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        worker.run(task)


def _end_with_the_command() -> None:
    poll = select.poll()
    poll.register(0, 0)  # nothing but that the other end is closed
    poll.poll()
    os._exit(1)


class _Worker:
    def __init__(self, output: Any, tokenizer_path: str) -> None:
        self._output = output
        self._tokenizer_path = tokenizer_path
        self._tokenizer: Tokenizer | None = None
        self._opened: tuple[Part | SourceConfig, TextSource] | None = None

    def run(self, task: Prepare | Encode) -> None:
        try:
            result = _prepare(task) if isinstance(task, Prepare) else self._encode(task)
        except UserError as error:
            self._send(_USER_ERROR, str(error).encode("utf-8"))
        except OSError as error:
            self._send(_OS_ERROR, str(error).encode("utf-8"))
        except Exception:
            self._send(_OTHER_ERROR, f"a process failed while it {task}:\n{traceback.format_exc()}".encode())
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
                TextSource(open_text(task.text, task.on_error, task.key), self._tokenizer),
            )
        return self._opened[1]

    def _send(self, kind: int, content: bytes) -> None:
        self._output.write(_HEADER.pack(kind, len(content)))
        self._output.write(content)
        self._output.flush()


def open_text(text: Part | SourceConfig, on_error: OnError, key: str) -> Documents:
    """The documents of a part, or of a dataset of the hub."""
    if isinstance(text, SourceConfig):
        from mf_train.data.hub import open_hub

        return open_hub(text, on_error, key)
    from mf_train.data.text_store import Documents as PartDocuments

    return PartDocuments(key, [text], 1)


def _prepare(task: Prepare) -> bytes:
    from mf_train.data.text_store import prepare_part

    try:
        return pickle.dumps(prepare_part(task.files, task.text_field, task.on_error, task.folder))
    except UserError as error:
        if isinstance(error.__cause__, OSError) and str(task.folder) in str(error):  # not data.cache's
            reason = error.__cause__.strerror
            raise UserError(
                f"{task.folder}: cannot be written ({reason}): free space there, or name another folder"
            ) from None
        raise
