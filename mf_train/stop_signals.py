"""The signals that ask a run to stop, and how a command listens to them."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

BY_LAUNCHER = (signal.SIGTERM, signal.SIGUSR1)
BY_TERMINAL = (signal.SIGHUP, signal.SIGINT)
STOP_SIGNALS = BY_LAUNCHER + BY_TERMINAL


def listen(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle each of STOP_SIGNALS; returns the handlers before, by signal.

    A terminal's that is ignored stays so: by nohup SIGHUP is, and by a shell that starts a command in the background
    SIGINT. For the main thread.
    """
    heard = [
        number
        for number in STOP_SIGNALS
        if number in BY_LAUNCHER or signal.getsignal(number) is not signal.SIG_IGN
    ]
    return {number: signal.signal(number, handler) for number in heard}
