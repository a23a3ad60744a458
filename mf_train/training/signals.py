"""SIGTERM and SIGUSR1 ask for a save at the next step boundary and an end with status 75."""

import signal
from types import FrameType


class StopRequest:
    """Set by SIGTERM or SIGUSR1 from `install` on; a second signal changes nothing."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._set)
        return self

    def ignore_more(self) -> None:
        """From now on requests are ignored: while Python ends, it would end by them and not with its status."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)

    def _set(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
