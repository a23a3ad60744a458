"""The run's saving beside its steps: which checkpoint is the last, and what waiting for saving costs."""

import time
from pathlib import Path

from mf_train.checkpoint.save import Extras, Saver
from mf_train.parallel.watch import Watch


class Saving:
    """Saves one checkpoint at a time and measures it. All calls but `take_metrics` are collective over all ranks."""

    def __init__(self, saver: Saver, watch: Watch, resumed: Path | None, step: int, seconds: float) -> None:
        self.saver = saver
        self.watch = watch
        self.last = resumed  # the newest complete checkpoint
        self.step = step  # of the newest one, complete or under way
        self.seconds = seconds  # that a save took, from its start to its end
        self._began = 0.0
        self._metrics: dict[str, float] = {}

    def start(self, step: int, extras: Extras | None, began: float, *, wait: bool) -> None:
        """Save the state of `step`, and `wait` for the end or go on meanwhile.

        `began` is when (perf_counter) the run left its steps to make `extras`.
        """
        self.saver.start(step, extras, copy=not wait)
        self._began, self.step = began, step
        self._count_stall(began)
        if wait:
            self.finish()

    def advance(self) -> None:
        """Go on with what was started; takes no time where nothing was."""
        self._note(self.saver.advance())

    def finish(self) -> None:
        """Wait until what was started is complete."""
        if self.saver.pending:
            started = time.perf_counter()
            self._note(self.saver.finish(self.watch.at, self.watch.beat))
            self._count_stall(started)

    def take_metrics(self) -> dict[str, float]:
        """Seconds since the last call that the steps waited for saving, and those from a save's start to its end."""
        taken, self._metrics = self._metrics, {}
        return taken

    def _note(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self.last = checkpoint
            self.seconds = self._metrics["checkpoint_seconds"] = time.perf_counter() - self._began

    def _count_stall(self, since: float) -> None:
        stall = self._metrics.get("checkpoint_stall_seconds", 0.0)
        self._metrics["checkpoint_stall_seconds"] = stall + time.perf_counter() - since
