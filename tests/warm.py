"""Processes that start warm: forks of a server that has imported torch, DeepSpeed and megatron-core.

Importing them takes 8 s of a processor, which hundreds of ranks and trainers of the tests would pay each. The server
(multiprocessing's, one for each process of pytest) has started no thread and computed nothing, so that a fork of it
is as good as a new process; what differs is said in `Running`.
"""

from __future__ import annotations

import atexit
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mf_train.parallel.launcher import end_with_parent

_SECONDS_TO_END = 30.0  # that torchrun gives the other ranks once one has failed


def start_warm(target: Callable[..., Any], *args: Any, daemon: bool = False) -> BaseProcess:
    """`target(*args)` in a process of its own, with what `tests.preloaded` imports.

    The tests for a GPU start from nothing: a fork of a process that has looked for a GPU cannot use it.
    """
    if "MF_GPU_TESTS" in os.environ:
        process: BaseProcess = get_context("spawn").Process(target=target, args=args, daemon=daemon)
        process.start()
        return process
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    process = context.Process(target=_call_in_fork, args=(target, *args), daemon=daemon)
    with _for_the_server():
        process.start()
    return process


def _call_in_fork(target: Callable[..., Any], *args: Any) -> None:
    gc.freeze()  # else each collection, of which ZeRO 3 makes many, goes through all that the server has imported
    target(*args)


@contextmanager
def _for_the_server() -> Iterator[None]:
    """One thread in whatever the server, if it starts now, imports: OpenMP's and BLAS's do not outlive a fork."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class Running:
    """`memoryformer ARGUMENTS` in forks: what subprocess.Popen has, of one process or of torchrun's.

    Unlike a process of its own it imports nothing anew and runs no finalisers of modules. Several ranks are looked
    after as torchrun does: when one fails, the others are asked to end, and the status is 1. Standard input is empty.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, processes: int = 1
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="running-")
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        self.returncode: int | None = None
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if processes > 1 else {}
        self.ranks: list[BaseProcess] = []
        for rank in range(processes):
            places = {name: str(rank) for name in ("RANK", "LOCAL_RANK")} if processes > 1 else {}
            sizes = {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE") if processes > 1}
            variables = {**environment, **meeting, **places, **sizes}
            self.ranks.append(start_warm(_run, list(arguments), variables, str(cwd), self._outputs))

    def send_signal(self, number: int) -> None:
        for rank in self.ranks:
            if rank.pid is not None and rank.exitcode is None:
                with suppress(ProcessLookupError):  # it has just ended
                    os.kill(rank.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """The status, where all have ended."""
        if self.returncode is None and all(rank.exitcode is not None for rank in self.ranks):
            statuses = [rank.exitcode or 0 for rank in self.ranks]
            self.returncode = statuses[0] if len(statuses) == 1 else int(any(statuses))
        return self.returncode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Waits for the end; standard output and error of all ranks."""
        deadline = time.monotonic() + timeout
        asked = False
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("memoryformer", timeout, *map(str, self.said()))
            alive = [rank for rank in self.ranks if rank.exitcode is None]
            if len(alive) < len(self.ranks) and not asked and any(rank.exitcode for rank in self.ranks):
                asked = True
                deadline = min(deadline, time.monotonic() + _SECONDS_TO_END)
                self.send_signal(signal.SIGTERM)
            wait([rank.sentinel for rank in alive], timeout=1.0)
        return self.said()

    def said(self) -> tuple[str, str]:
        """Standard output and error of all ranks so far."""
        out, error = (path.read_text() for path in self._outputs)
        return out, error


def _run(arguments: list[str], environment: dict[str, str], cwd: str, outputs: list[Path]) -> None:
    """In the fork."""
    from mf_train.cli import main

    end_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may run where it is ignored
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, path in enumerate(outputs, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["memoryformer", *arguments]
    try:
        main(arguments)
    finally:
        atexit._run_exitfuncs()


def free_port() -> int:
    """A free port below the ephemeral range, where no outgoing connection can take it meanwhile."""
    for port in random.SystemRandom().sample(range(12000, 32000), 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port between 12000 and 32000")
