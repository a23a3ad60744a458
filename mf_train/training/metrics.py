"""A run's records: metrics.jsonl, TensorBoard, and the line that rank 0 shows."""

import json
import resource
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from mf_train.errors import TrainingError
from mf_train.files import replacing
from mf_train.progress import ProgressLine
from mf_train.run_folder import METRICS, TENSORBOARD, parse_record


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl, and its numbers to TensorBoard. For rank 0."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.file = (folder / METRICS).open("a", encoding="utf-8")
        self.tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / TENSORBOARD))

    def write(self, metrics: dict[str, Any]) -> None:
        """Raises TrainingError where the file cannot be written."""
        try:
            self.file.write(json.dumps(metrics) + "\n")
            self.file.flush()
        except OSError as error:
            raise TrainingError(f"{self.file.name}: {error.strerror}; make room and run again") from error
        if self.tensorboard is None:
            return
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "step":
                self.tensorboard.add_scalar(key, value, metrics["step"])
        for name, report in metrics.get("tables", {}).items():
            for key, value in report.items():
                if isinstance(value, int | float):
                    self.tensorboard.add_scalar(f"tables/{key}/{name}", value, metrics["step"])

    def close(self) -> None:
        with suppress(OSError):  # `write` has told of it
            self.file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()


def cut_metrics(folder: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and an unfinished last line; the file is replaced as a whole."""
    path = folder / METRICS
    if not path.exists():
        return
    with replacing(path) as new, path.open("rb") as old:
        for line in old:
            if line.endswith(b"\n") and 0 < parse_record(line).get("step", 0) <= step:
                new.write(line)


class LiveLine(ProgressLine):
    """Loss, speed, wait and time left: rewritten at every step on a terminal, else a line every `interval` steps."""

    def __init__(self, steps: int, interval: int) -> None:
        super().__init__(sys.stdout)
        self.steps = steps
        self.interval = interval
        self.recent: deque[float] = deque(maxlen=50)
        self.first = True

    def show_step(self, metrics: dict[str, Any]) -> None:
        self.recent.append(metrics["step_seconds"])
        step = metrics["step"]
        left = (self.steps - step) * sum(self.recent) / len(self.recent)
        wait = 100 * metrics["data_wait_seconds"] / metrics["step_seconds"]
        if self.terminal or self.first or step % self.interval == 0 or step == self.steps:
            self.show(
                f"step {step}/{self.steps}  loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
                f"data wait {wait:.1f} %  {time.strftime('%H:%M:%S', time.gmtime(left))} left"
            )
        self.first = False


def process_peak() -> int:
    """The largest memory that this process has held at once so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
