"""Runs a function in several real processes that can talk over gloo: what distributed tests are made of."""

from __future__ import annotations

import faulthandler
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from mf_train.parallel.launcher import end_with_parent
from tests.warm import free_port as _free_port
from tests.warm import start_warm

_SECONDS_TO_LEAVE = 10.0  # after its result is in, how long a process may take to end


class DistributedError(AssertionError):
    """A rank failed, died or did not finish in time. The message has its traceback."""


def run_distributed(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0, init: bool = False
) -> list[Any]:
    """`[fn(rank, world_size, *args) for rank in range(world_size)]`, each call in a process of its own.

    `fn` is a function at the top of its module; `args` and the results are pickled (tensors by value). Each
    process has RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
    environment, nothing of SLURM, one thread, and gloo on the loopback device. torch.distributed is
    initialised (gloo) only if `init`.

    Raises DistributedError with the first failing rank's traceback, or with every unfinished rank's stack
    after `timeout` seconds. No process is left behind in any case.
    """
    payload = pickle.dumps((fn, args))
    port = _free_port()
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="run-distributed-") as folder:
        try:
            for rank in range(world_size):
                receiving, sending = Pipe(duplex=False)
                environment = {
                    **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": "lo",
                    "OMP_NUM_THREADS": "1",
                }
                stack_file = _stack_file(folder, rank)
                process = start_warm(_run_rank, environment, payload, sending, stack_file, init)
                sending.close()  # so that this end sees the end of file when the process dies
                processes.append(process)
                pipes.append(receiving)
            return _gather(processes, pipes, time.monotonic() + timeout, timeout, folder)
        finally:
            _end(processes)
            for pipe in pipes:
                pipe.close()


def _gather(
    processes: list[BaseProcess], pipes: list[Connection], deadline: float, timeout: float, folder: str
) -> list[Any]:
    """The ranks' results in order; raises the first failure. A rank sends the moment of its failure, or None."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        unfinished = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in unfinished], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise DistributedError(
                f"ranks {unfinished} did not finish in {timeout:g} s; their stacks:\n"
                + "\n".join(_stack(processes[rank], rank, folder) for rank in unfinished)
            )
        failures: list[tuple[float, str]] = []
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failed_at, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join(_SECONDS_TO_LEAVE)
                stack = Path(_stack_file(folder, rank)).read_text()
                failures.append((0.0, f"rank {rank} died with exit code {processes[rank].exitcode}\n{stack}"))
                continue
            if failed_at is None:
                results[rank] = value
            else:
                failures.append((failed_at, f"rank {rank} raised:\n{value}"))
        if failures:  # a rank that misses another in a collective raises too, and both may be heard at once
            raise DistributedError(min(failures)[1])
    for process in processes:
        process.join(_SECONDS_TO_LEAVE)
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    environment: dict[str, str], payload: bytes, pipe: Connection, stack_file: str, init: bool
) -> None:
    """The body of one process."""
    os.setsid()  # a process group of its own, so that what it starts ends with it
    end_with_parent()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(open(stack_file, "w"))  # SIGABRT from the parent, or a crash, writes the stacks
    os.environ.clear()
    os.environ.update(environment)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        fn, args = pickle.loads(payload)
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        if init:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        message = pickle.dumps((None, fn(rank, world_size, *args)))
    except BaseException:
        pipe.send_bytes(pickle.dumps((time.monotonic(), traceback.format_exc())))
        pipe.close()
        sys.exit(1)
    pipe.send_bytes(message)
    pipe.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def _stack_file(folder: str, rank: int) -> str:
    return os.path.join(folder, f"rank-{rank}.stack")


def _stack(process: BaseProcess, rank: int, folder: str) -> str:
    """Ends the process with SIGABRT, on which faulthandler writes the stacks of its threads."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGABRT)
        process.join(2.0)
    path = Path(_stack_file(folder, rank))
    return f"rank {rank}:\n{path.read_text() if path.exists() else '(had not started)'}"


def _end(processes: list[BaseProcess]) -> None:
    """Kills what is left of the processes and of what they started."""
    for process in processes:
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # ended already, or too young to have its group
        process.join()
        process.close()
