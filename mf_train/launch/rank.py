"""One rank of a job, its output in a file of its own: `python -m mf_train.launch.rank LOGS -- train CONFIG ...`.

Started by the agent of its node (`mf_train.launch.agent`), or as a task of srun. Runs the command line that stands
after `--` in this process. Whatever it and its children write goes to LOGS/rank-00003.log. Rank 0's log is copied to
what was its standard output: by the agent, or, under srun, by a small parent process that outlives it, so that the
copy is whole however the rank ends.
"""

from __future__ import annotations

import ctypes
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
from types import FrameType

import mf_train
from mf_train.errors import UserError
from mf_train.launch.logs import Copy, Ending, format_ending, format_head, open_log, rank_log, say, size_of
from mf_train.launch.node import FORWARDED, STOP_SIGNALS, STOPPED, raise_open_files
from mf_train.parallel.processes import find_process

AGENT_VARIABLE = "MF_TRAIN_AGENT"  # the agent's process id, in the environment of its workers
_PR_SET_PDEATHSIG = 1  # prctl(2)
_COPY_SECONDS = 30.0  # for the rest of rank 0's output, where its reader is slow


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with the command's status; 75 where it was asked to stop before it listened for that."""
    try:
        folder, command = parse(sys.argv[1:] if arguments is None else arguments)
        run_rank(folder, lambda: _run_command(command))
    except (UserError, OSError) as error:
        print(f"memoryformer: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)


def parse(arguments: Sequence[str]) -> tuple[Path, list[str]]:
    """LOGS and what follows `--`. Raises UserError."""
    if len(arguments) < 3 or arguments[1] != "--":
        raise UserError("usage: python -m mf_train.launch.rank LOGS -- train CONFIG [section.key=value ...]")
    return Path(arguments[0]), list(arguments[2:])


def run_rank(folder: Path, action: Callable[[], None]) -> None:
    """Run an action with this process's output in its rank's log; ends the process with the action's status.

    Raises UserError where the launcher's variables are incomplete and OSError where the log cannot be written.
    """
    raise_open_files()
    rank = find_process().rank
    agent = os.environ.get(AGENT_VARIABLE)
    path = rank_log(folder, rank)
    try:
        log = open_log(path)
    except OSError as error:
        raise OSError(
            f"{path}: the log of rank {rank} cannot be written on {socket.gethostname()}: {error}"
        ) from None
    if agent is None and rank == 0:
        _fork_and_copy(path)
    if agent is None:
        # Under an agent it is the signal's own work to end a process that does not listen yet: the agent knows then
        # that there was nothing to save.
        for number in STOP_SIGNALS:
            signal.signal(number, _stop_early)
    else:
        _end_with(int(agent))
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(2)  # type: ignore[arg-type]
    python = f"pid {os.getpid()}, python {platform.python_version()} ({sys.executable})"
    say(2, format_head(rank, socket.gethostname(), f"{python}, {Path(mf_train.__file__).parent}"))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = _status_of(action)
    sys.stdout.flush()
    sys.stderr.flush()
    _say_ending(rank, status)
    sys.exit(status)


def _run_command(command: list[str]) -> None:
    """`python -m mf_train COMMAND` in this process."""
    sys.argv = ["memoryformer", *command]
    runpy.run_module("mf_train", run_name="__main__")


def _status_of(action: Callable[[], None]) -> int:
    try:
        action()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _say_ending(rank: int, status: int) -> None:
    say(2, format_ending(Ending(rank, socket.gethostname(), status, time.time())))


def _stop_early(number: int, frame: FrameType | None) -> None:
    """Asked to stop while the program is still loading: nothing has been done that could be saved."""
    say(2, f"asked to stop by {signal.Signals(number).name} before training began")
    _say_ending(find_process().rank, STOPPED)
    os._exit(STOPPED)


def _end_with(agent: int) -> None:
    """Ask the kernel to kill this process when its agent dies: a rank that nobody watches would hold its GPU."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # another system than Linux
        return
    if os.getppid() != agent:  # it died before
        os._exit(1)


def _fork_and_copy(path: Path) -> None:
    """Go on in a child; the parent hands signals on, copies the log to its output and ends as the child does."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*FORWARDED, signal.SIGCHLD})
    parent, offset = os.getpid(), size_of(path)
    child = os.fork()
    if child == 0:
        _end_with(parent)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        return
    copy = Copy(path, 1, offset)
    while True:
        number = signal.sigwait({*FORWARDED, signal.SIGCHLD})
        if number != signal.SIGCHLD:
            os.kill(child, number)
            continue
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
    copy.close(_COPY_SECONDS)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
