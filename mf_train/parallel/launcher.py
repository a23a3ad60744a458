"""Ending with the launcher: a rank that nobody looks after would hold its GPU and memory. Imports no torch.

Whose end is this process's end: torchrun's agent, where torchrun started it, and the step's slurmstepd, where srun did
itself. A shell that started a run in the background is neither.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

from mf_train.exit_status import FAILED

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LOOK_SECONDS = 2.0
_TRIES, _TRY_SECONDS = 50, 0.1


class Launcher(NamedTuple):
    """The process that started this rank."""

    name: str
    pid: int


class _Stat(NamedTuple):
    """Of proc(5), /proc/PID/stat. Together with its start a number names one process for ever."""

    state: str
    parent: int
    start: int


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when the thread that started it ends (Linux; elsewhere nothing happens).

    `parent` is the number of that thread's process, where the caller knows it: one that is gone ends this process now.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and os.getppid() != parent:
            os._exit(FAILED)


def end_with_launcher(environment: Mapping[str, str] = os.environ) -> None:
    """End this process, within seconds, when the launcher that started it is gone, or now where it is gone already.

    Does nothing where no launcher did, and on systems without /proc. A thread looks for the launcher; where torchrun's
    agent is the parent the kernel does so too, whatever holds the interpreter.
    """
    launcher = find_launcher(environment)
    if launcher is None:
        return
    stat = _stat(launcher.pid)
    if stat is None:
        _end(launcher)
    if launcher.name == "torchrun" and launcher.pid == os.getppid():
        end_with_parent(launcher.pid)

    def look() -> None:
        while (now := _stat(launcher.pid)) and now.start == stat.start and now.state not in "ZX":
            time.sleep(_LOOK_SECONDS)
        _end(launcher)

    threading.Thread(target=look, name="launcher", daemon=True).start()


def find_launcher(environment: Mapping[str, str] = os.environ) -> Launcher | None:
    """Who started this rank; None: no launcher. Its number is 0 where it has ended before it could be found.

    torchrun tells nobody its number. Its agent is the nearest ancestor, past wrappers of the rank, that has torch
    loaded: a process whose parent died is given to init, or to what took init's part, which has not. srun is looked for
    only as the parent: a shell of `srun --pty` is left alone.
    """
    own = _stat(os.getpid())
    if own is None:
        return None
    if "TORCHELASTIC_RUN_ID" in environment:
        agent = _find_agent(own)
        return None if agent is None else Launcher("torchrun", agent)
    with suppress(OSError):
        if "SLURM_PROCID" in environment and _read(own.parent, "comm").strip() == "slurmstepd":
            return Launcher("srun", own.parent)
    return None


def _end(launcher: Launcher) -> NoReturn:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0")
    line = f"memoryformer: rank {rank} ends, because {launcher.name}, which started it, is gone\n"
    with suppress(OSError):
        os.write(2, line.encode())  # past sys.stderr, whose lock another thread may hold
    os._exit(FAILED)


def _find_agent(own: _Stat) -> int | None:
    """The nearest ancestor that has torch loaded, 0 if none has; None where torchrun cannot be seen from here.

    Looked for again while one of them is ending: a process that ends gives its memory back first, then its children.
    """
    for _ in range(_TRIES):
        ancestors, stat = [], _stat(os.getpid())
        while stat is not None and stat.parent > 0:
            ancestors.append(stat.parent)
            stat = _stat(stat.parent)
        with_torch = [_has_torch(pid) for pid in ancestors]
        if True in with_torch and None not in with_torch[: with_torch.index(True)]:
            return ancestors[with_torch.index(True)]
        if None not in with_torch:
            # a container of the rank's own, where process 1 is as young as the rank: torchrun takes longer to start
            first = _stat(ancestors[-1]) if ancestors else None
            alone = first is None or own.start - first.start < os.sysconf("SC_CLK_TCK")
            return None if alone else 0
        time.sleep(_TRY_SECONDS)
    return os.getppid()  # whatever it is: its end is noticed


def _has_torch(pid: int) -> bool | None:
    """None: the process is ending."""
    try:
        if "libtorch" in _read(pid, "maps"):
            return True
        return False if _read(pid, "maps") else None  # what was read was whole if there is still something
    except PermissionError:  # another user's, or one that hides: it counts where it may be
        return "python" in _read(pid, "cmdline")
    except OSError:
        return None


def _stat(pid: int) -> _Stat | None:
    """None where there is no such process."""
    try:
        fields = _read(pid, "stat").rpartition(")")[2].split()
        return _Stat(fields[0], int(fields[1]), int(fields[19]))
    except (OSError, IndexError):
        return None


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
