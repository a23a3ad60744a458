"""A child process that receives pickled tasks on standard input and answers through a pipe of its own.

The pipes are all that the two share: nothing stays behind when either is killed, and each notices at once. (A
ProcessPoolExecutor waits for ever for the rest of a result when its process is killed half way through sending it, and
its semaphores stay in /dev/shm when all are killed.)
"""

from __future__ import annotations

import fcntl
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from contextlib import suppress
from itertools import islice
from multiprocessing import Pipe
from typing import Any

from mf_train.errors import TrainingError, UserError
from mf_train.stop_signals import STOP_SIGNALS

USER_ERROR, OS_ERROR, OTHER_ERROR = 1, 2, 3  # kinds of messages that carry a text

LEAST_PIPE_BYTES, MOST_PIPE_BYTES = 2**16, 2**20  # Linux' default, and the most it gives without privileges
_STANDARD_ERROR = 2  # where the child's standard output goes, too: what a library prints is no message

# The parent's own module path, whatever it was started by; -P keeps the working folder out until then.
_COMMAND = """\
import importlib, pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)
importlib.import_module(sys.argv[1]).main(int(sys.argv[2]))
"""


class Child:
    """A process that runs `main(pipe)` of a module; `answers` is the other end of that pipe, a descriptor there."""

    def __init__(self, module: str, pipe_bytes: int) -> None:
        self.answers, theirs = Pipe(duplex=False)
        with suppress(PermissionError, AttributeError):  # a user's pipes have a limit; Linux only
            size = min(max(pipe_bytes, LEAST_PIPE_BYTES), MOST_PIPE_BYTES)
            fcntl.fcntl(self.answers.fileno(), fcntl.F_SETPIPE_SZ, size)
        # A launcher or a terminal asks all processes at once: the parent decides what that means. A blocked signal
        # stays blocked in the process that is started: there is no moment when it could end it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _COMMAND, module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.PIPE,
                stdout=_STANDARD_ERROR,
                bufsize=0,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        self.send([os.path.abspath(entry) for entry in sys.path])

    def send(self, message: Any) -> None:
        """Pickles the message. Nothing happens when the process has died: reading its output tells."""
        assert self.process.stdin is not None
        content = memoryview(pickle.dumps(message))
        with suppress(BrokenPipeError):
            while content:
                content = content[self.process.stdin.write(content) :]

    def hang_up(self) -> None:
        """Tell the process to end."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def end(self, patience: float) -> int | None:
        """The exit status. The process is killed if it does not end by itself within `patience` seconds."""
        for seconds in (patience, 1.0):
            try:
                return self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return None  # in a read that cannot be interrupted: it ends when the kernel comes back from it

    def close(self, patience: float) -> None:
        """End the process and close the pipes."""
        self.hang_up()
        self.end(patience)
        self.answers.close()


def end_with_the_parent() -> None:
    """In the child: from now on it ends when its standard input is closed, whatever it is busy with."""

    def wait() -> None:
        poll = select.poll()
        poll.register(0, 0)  # nothing but that the other end is closed
        poll.poll()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class Messages:
    """In the child: messages on their way into the pipe, and up to `ahead` that wait in front of it.

    A pipe whose other end is closed ends the process.
    """

    def __init__(self, pipe: int, ahead: int) -> None:
        self._pipe = pipe
        self._most = 2 * ahead
        self._waiting: deque[memoryview] = deque()
        self._poll = select.poll()
        self._poll.register(pipe, select.POLLOUT)
        os.set_blocking(pipe, False)

    def put(self, header: bytes, body: bytes | memoryview) -> None:
        """Sends a message, or holds it back; waits while more than `ahead` messages are held back."""
        self._waiting += (memoryview(header), memoryview(body))
        self._send(self._most)

    def finish(self) -> None:
        """Waits until everything is sent."""
        self._send(0)

    def _send(self, most: int) -> None:
        while self._waiting:
            try:
                sent = os.writev(self._pipe, list(islice(self._waiting, 16)))
            except BlockingIOError:
                if len(self._waiting) <= most:
                    return
                self._poll.poll()
                continue
            except BrokenPipeError:
                os._exit(0)
            while sent:
                part = self._waiting.popleft()
                if sent < len(part):
                    self._waiting.appendleft(part[sent:])
                    break
                sent -= len(part)


def describe_error(error: BaseException) -> tuple[int, str]:
    """The kind and text of a message about what was raised in the child."""
    if isinstance(error, UserError):
        return USER_ERROR, str(error)
    if isinstance(error, OSError):
        return OS_ERROR, str(error) or type(error).__name__
    return OTHER_ERROR, "".join(traceback.format_exception(error))


def error_of(kind: int, text: str) -> Exception:
    """The exception that the parent raises for a message: UserError, OSError, or TrainingError with the traceback."""
    return {USER_ERROR: UserError, OS_ERROR: OSError}.get(kind, TrainingError)(text)
