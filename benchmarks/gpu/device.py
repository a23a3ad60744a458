"""The device that is measured, and its clock. The CPU takes its place in a rehearsal."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]
_SLEEP_CYCLES_A_CALL = 900_000  # half a millisecond at 1.8 GHz: longer than Python takes to launch a call
ROTATION_BYTES = 256 * 2**20  # several times any L2 cache


class TimedDevice:
    """Where tensors are made, and the seconds that calls take there."""

    def __init__(self, rehearse: bool) -> None:
        self.rehearse = rehearse
        self.type = "cpu" if rehearse else "cuda"
        if not rehearse and not torch.cuda.is_available():
            raise SystemExit(f"torch {torch.__version__} finds no GPU")

    @property
    def memory(self) -> int:
        """Free bytes."""
        return 2**33 if self.rehearse else torch.cuda.mem_get_info()[0]

    def measure(self, calls: list[Call], seconds: float = 0.15) -> float:
        """Median seconds that the device takes for a call, calling each of `calls` in turn."""
        if self.rehearse:
            return self._elapsed(calls[:1])[0]
        for call in calls[:2]:
            call()
        estimate = self._elapsed([calls[0]])[0]
        repeats = min(max(int(seconds / max(estimate, 1e-6)), 5), 100)
        return statistics.median(self._elapsed(list(itertools.islice(itertools.cycle(calls), repeats))))

    def _elapsed(self, calls: list[Call]) -> list[float]:
        """Seconds of each call."""
        if self.rehearse:
            times = [time.perf_counter()]
            for call in calls:
                call()
                times.append(time.perf_counter())
            return [end - start for start, end in itertools.pairwise(times)]
        # the device sleeps first, so that it never waits for Python between two events
        torch.cuda.synchronize()
        torch.cuda._sleep(_SLEEP_CYCLES_A_CALL * (len(calls) + 5))
        marks = [torch.cuda.Event(enable_timing=True)]
        marks[0].record()
        for call in calls:
            call()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def copy_bandwidth(self, num_bytes: int) -> float:
        """Bytes a second, read plus written, of copying `num_bytes` again and again."""
        source = torch.ones(num_bytes // 4, device=self.type)
        target = torch.empty_like(source)
        return 2 * num_bytes / self.measure([lambda: target.copy_(source)])

    def require(self, num_bytes: float, what: str) -> None:
        """Raises RuntimeError where the device has less free memory than `what` needs."""
        free = self.memory
        if num_bytes > free:
            raise RuntimeError(
                f"too little memory: {what} needs {num_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            )
