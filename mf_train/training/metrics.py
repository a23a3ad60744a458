"""What a run records: metrics.jsonl, TensorBoard, and the line that rank 0 shows."""

import json
import os
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from mf_train.checkpoint.files import naming
from mf_train.errors import TrainingError


class MetricsWriter:
    """Appends one JSON object a step to metrics.jsonl, and its numbers to TensorBoard. For rank 0."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self.tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"))

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
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    beside = path.with_suffix(".partial")
    with (
        naming(beside),
        path.open(encoding="utf-8", errors="replace") as old,
        beside.open("w", encoding="utf-8") as new,
    ):
        for line in old:
            try:
                kept = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                kept = False
            if kept:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(beside, path)


class LiveLine:
    """Loss, speed, wait and time left: one line rewritten on a terminal, else a line every `interval` steps."""

    def __init__(self, steps: int, interval: int) -> None:
        self.steps = steps
        self.interval = interval
        self.terminal = sys.stdout.isatty()
        self.recent: deque[float] = deque(maxlen=50)
        self.first = True
        self.open = False  # the terminal's cursor stands behind a line that is still rewritten

    def show(self, metrics: dict[str, Any]) -> None:
        self.recent.append(metrics["step_seconds"])
        step = metrics["step"]
        left = (self.steps - step) * sum(self.recent) / len(self.recent)
        wait = 100 * metrics["data_wait_seconds"] / metrics["step_seconds"]
        text = (
            f"step {step}/{self.steps}  loss {metrics['loss']:.4f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"data wait {wait:.1f} %  {time.strftime('%H:%M:%S', time.gmtime(left))} left"
        )
        if self.terminal:
            print(f"\r\033[K{text}", end="", flush=True)
            self.open = True
        elif self.first or step % self.interval == 0 or step == self.steps:
            print(text, flush=True)
        self.first = False

    def say(self, text: str) -> None:
        """Print a line of its own, below what was shown."""
        print(f"\n{text}" if self.open else text, flush=True)
        self.open = False
