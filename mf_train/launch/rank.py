"""One rank of a job, started by torchrun or srun: `python -m mf_train.launch.rank LOGS -- train CONFIG ...`.

The command runs in a child process, whose output, with that of its own children, goes to LOGS/rank-00003.log. This
process imports no torch. It hands signals on, asks the child to stop when the job's script has made the file LOGS/stop,
and adds a line on how the child ended, also where a signal killed it. `mf_train.launch.report` reads these lines.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import mf_train
from mf_train.errors import UserError
from mf_train.exit_status import DONE, FAILED, MISTAKE, STOPPED
from mf_train.launch.logs import (
    Ending,
    format_ending,
    format_head,
    format_request,
    open_log,
    rank_log,
    stop_file,
)
from mf_train.parallel.launcher import end_with_launcher, end_with_parent
from mf_train.parallel.processes import find_process
from mf_train.stop_signals import STOP_SIGNALS

# Between looks for LOGS/stop. Rank 0 is on the node of the job's script; ranks that train hear of it from rank 0.
_LOOK_SECONDS_OF_FIRST, _LOOK_SECONDS = 0.2, 2.0


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exits as `run_rank` says; 2 for a wrong command line or environment, 1 where the log cannot be written."""
    try:
        folder, command = parse(sys.argv[1:] if arguments is None else arguments)
        status = run_rank(folder, lambda: _run_command(command))
    except (UserError, OSError) as error:
        print(f"memoryformer: {error}", file=sys.stderr, flush=True)
        status = MISTAKE if isinstance(error, UserError) else FAILED
    sys.exit(status)


def parse(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """LOGS and what follows `--`. Raises UserError."""
    if len(arguments) < 3 or arguments[1] != "--":
        raise UserError("usage: python -m mf_train.launch.rank LOGS -- train CONFIG [section.key=value ...]")
    return Path(arguments[0]), list(arguments[2:])


def run_rank(folder: Path, action: Callable[[], None]) -> int:
    """Run an action in a child process and wait for its end; the status that this process is to exit with.

    0 where the child ended with 0, or with 75 after saving: torchrun takes anything else for a failure and ends the
    other ranks. 75 where a request to stop ended a child that did not listen for it yet: the others cannot train
    without it. Else the child's status, 128 + n for signal n. Raises UserError where the launcher's variables are
    incomplete and OSError where the log cannot be written.
    """
    rank, host = find_process().rank, socket.gethostname()
    path = rank_log(folder, rank)
    try:
        log = open_log(path)
    except OSError as error:
        raise OSError(f"{path}: the log of rank {rank} cannot be written on {host}: {error}") from None
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
    parent, child = os.getpid(), os.fork()
    if child == 0:
        end_with_parent(parent)
        _work(log, rank, host, action)
    end_with_launcher()  # after the fork: it starts a thread
    look = _LOOK_SECONDS if rank else _LOOK_SECONDS_OF_FIRST
    code = _wait_for(
        child, stop_file(folder), look, lambda number: _write(log, format_request(rank, host, number))
    )
    note = "out of memory?" if code == -signal.SIGKILL else ""
    ending = Ending(rank, host, code if code >= 0 else 128 - code, time.time(), note)
    _write(log, format_ending(ending))
    if ending.on_request:
        return STOPPED
    return DONE if ending.status in (DONE, STOPPED) else ending.status


def _wait_for(child: int, stop: Path, look: float, note: Callable[[int], None]) -> int:
    """Hand signals on to the child until it ends; its exit code, or -n for signal n."""
    asked = False
    while True:
        number = None
        if not asked and os.path.exists(stop):
            number, asked = signal.SIGUSR1, True
        elif taken := signal.sigtimedwait({*STOP_SIGNALS, signal.SIGCHLD}, look):
            number = signal.Signals(taken.si_signo)
        if number in STOP_SIGNALS:
            os.kill(child, number)
            note(number)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)


def _work(log: int, rank: int, host: str, action: Callable[[], None]) -> NoReturn:
    """In the child: the action, with its output in the log."""
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(2)  # type: ignore[arg-type]
    python = f"pid {os.getpid()}, python {platform.python_version()} ({sys.executable})"
    _write(log, format_head(rank, host, f"{python}, {Path(mf_train.__file__).parent}"))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*STOP_SIGNALS, signal.SIGCHLD})
    status: object = FAILED
    try:
        action()
        status = DONE
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.exit(status)  # type: ignore[arg-type]


def _run_command(command: list[str]) -> None:
    """`python -m mf_train COMMAND` in this process."""
    sys.argv = ["memoryformer", *command]
    runpy.run_module("mf_train", run_name="__main__")


def _write(log: int, line: str) -> None:
    """A line of its own, also where the child was killed in the middle of one."""
    size = os.fstat(log).st_size
    begin = "" if size == 0 or os.pread(log, 1, size - 1) == b"\n" else "\n"
    os.write(log, f"{begin}{line}\n".encode())


if __name__ == "__main__":
    main()
