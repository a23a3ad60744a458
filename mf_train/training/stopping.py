"""Reasons to stop a run early: a signal, or a job's time limit that is nearer than the launcher's notice tells.

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C ask for a save at the next step boundary and an end with status 75.
"""

import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType

from mf_train.exit_status import INTERRUPTED
from mf_train.stop_signals import STOP_SIGNALS, listen

_RESERVE_SECONDS, _RESERVE_SHARE = 10.0, 0.25  # storage is slower at times


class StopRequest:
    """Set by SIGTERM, SIGUSR1, SIGHUP or SIGINT (Ctrl-C) from `install` on.

    More of them change nothing, but a second Ctrl-C ends the process at once, without saving.
    """

    def __init__(self) -> None:
        self._requested = False
        self._interrupted = False  # by Ctrl-C
        self._words = b""

    def requested(self) -> bool:
        return self._requested

    def install(self, *, speak: bool = False) -> "StopRequest":
        """Listen. With `speak` the first Ctrl-C is answered on standard error."""
        if speak:
            self._words = (
                b"\nsaving after this step, then ending; Ctrl-C again ends at once, without saving\n"
            )
        listen(self._set)
        return self

    def ignore_more(self) -> None:
        """From now on requests are ignored: while Python ends, it would end by them and not with its status."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._set:
                signal.signal(number, signal.SIG_IGN)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        if self._interrupted and number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
            os._exit(INTERRUPTED)  # what torchrun makes of its second Ctrl-C
        if number != signal.SIGINT:
            return
        self._interrupted = True
        # the next one is the kernel's, which ends the process whatever it waits for
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._words:
            with suppress(OSError):
                os.write(2, self._words)  # past sys.stderr, whose lock the main program may hold


class Deadline:
    """When a run must stop by itself so that its last checkpoint is complete at the job's time limit.

    `end` is the limit in seconds since 1970 (inf: none), `notice` how many seconds before it the launcher sends its
    signal. For rank 0, whose clock counts.
    """

    def __init__(self, end: float, notice: float, saves: int) -> None:
        self.end = end
        self.notice = notice
        self.saves = saves  # to wait for: 2 where one may be under way when the last one begins
        self._steps = 0
        self._longest = 0.0
        self._warned = False

    def note_step(self, seconds: float) -> None:
        """Record how long one iteration of the loop took: a step and, if due, a validation.

        A stop may have to wait for two of these: it is agreed on at a step's end, and a request that comes while a
        validation or a save goes on waits for the next. The first iteration does not count, it includes compilation.
        """
        self._steps += 1
        if self._steps > 1:
            self._longest = max(self._longest, seconds)

    def needed(self, save_seconds: float) -> float:
        """Seconds before the limit at which to stop, from what a save took."""
        return _RESERVE_SECONDS + (1 + _RESERVE_SHARE) * (self.saves * save_seconds + 2 * self._longest)

    def warning(self, save_seconds: float) -> str | None:
        """The line to show, once, where the notice is too short."""
        needed = self.needed(save_seconds)
        if self._warned or math.isinf(self.end) or needed <= self.notice:
            return None
        self._warned = True
        return (
            f"warning: a save takes {save_seconds:.0f} s and a step, or a validation, {self._longest:.1f} s, so the "
            f"notice of {self.notice:.0f} s is too short; this run stops {needed:.0f} s before the job's time limit "
            f"(launch with --notice {math.ceil(needed / 60) * 60})"
        )

    def passed(self, save_seconds: float) -> bool:
        """Whether it is time to stop."""
        return time.time() >= self.end - self.needed(save_seconds)


def find_deadline(environment: Mapping[str, str], saves: int) -> Deadline:
    """The limit of the SLURM job around this process: SLURM_JOB_END_TIME (sbatch(1)) and MF_NOTICE_SECONDS.

    The job script sets both where SLURM does not; a process outside a job has no limit.
    """

    def read(name: str, default: float) -> float:
        try:
            return float(environment[name])
        except (KeyError, ValueError):
            return default

    end = read("SLURM_JOB_END_TIME", 0.0) or math.inf
    return Deadline(end, read("MF_NOTICE_SECONDS", math.inf), saves)
