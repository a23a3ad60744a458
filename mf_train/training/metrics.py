"""A run's records: metrics.jsonl, TensorBoard, Weights & Biases, and the line that rank 0 shows."""

import json
import resource
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from mf_train.config import Config
from mf_train.errors import TrainingError
from mf_train.files import replacing
from mf_train.progress import ProgressLine
from mf_train.run_folder import METRICS, TENSORBOARD, parse_record
from mf_train.telemetry.alarms import alarm_lines
from mf_train.text import time_left
from mf_train.training.wandb_run import WandbRun


class Records:
    """Writes a run's metrics.jsonl and TensorBoard, and shows its line, on rank 0; on other ranks nothing happens."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.rank = rank
        self.line = LiveLine(config.training.steps, config.logging.interval)
        self.failure: TrainingError | None = None  # why the last step could not be written
        self._file: TextIO | None = None
        self._tensorboard: Any = None
        self._wandb: WandbRun | None = None

    def open(self, step: int) -> None:
        """Begin to record what comes after `step`. Raises OSError, and UserError where Weights & Biases refuses."""
        if self.rank != 0:
            return
        folder = Path(self.config.training.output_dir)
        cut_metrics(folder, step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        if self.config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # what an earlier start wrote of later steps is dropped by whoever reads, as `cut_metrics` drops it
            self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)
        if self.config.logging.wandb.project:
            self._wandb = WandbRun(self.config, step)

    def write(self, metrics: dict[str, Any]) -> None:
        """Record and show one step. Where the file cannot be written, `failure` is set, for `check`."""
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(metrics) + "\n")
            self._file.flush()
        except OSError as error:
            self.failure = TrainingError(f"{self._file.name}: {error.strerror}; make room and run again")
        else:
            self._add_scalars(metrics)
        self.line.show_step(metrics)
        if "skipped" in metrics:
            self.say(
                f"step {metrics['step']}: not trained on batch {metrics['batch_digest']}: {metrics['skipped']}; "
                f"steps skipped so far: {metrics['skipped_steps']}"
            )
        for warning in alarm_lines(metrics["step"], metrics.get("alarms", ())):
            self.say(warning)
        if "validation_loss" in metrics:
            self.say(f"step {metrics['step']}: validation loss {metrics['validation_loss']:.4f}")
            for name, found in metrics["validation"].items() if len(metrics["validation"]) > 1 else ():
                bits = f", {found['bits_per_byte']:.4f} bits a byte" if found["bits_per_byte"] else ""
                self.say(f"  {name}: loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}{bits}")

        for task, report in metrics.get("evaluate", {}).items():
            values = ", ".join(
                f"{name} {'-' if value is None else f'{value:.4f}'}" for name, value in report.items()
            )
            self.say(f"step {metrics['step']}: {task}: {values}")

    def check(self) -> None:
        """Raises TrainingError where the last step could not be written."""
        if self.failure is not None:
            raise self.failure

    def say(self, text: str) -> None:
        if self.rank == 0:
            self.line.say(text)

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # `failure` has told of it
                self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close()

    def _add_scalars(self, metrics: dict[str, Any]) -> None:
        nested = {
            f"{kind}/{key}/{name}": value
            for kind in ("tables", "validation")
            for name, report in metrics.get(kind, {}).items()
            for key, value in report.items()
        }
        nested |= {
            f"evaluate/{task}/{metric}": value
            for task, report in metrics.get("evaluate", {}).items()
            for metric, value in report.items()
        }
        step = metrics["step"]
        scalars = {
            key: value
            for key, value in (metrics | nested).items()
            if isinstance(value, int | float) and key != "step"
        }
        if self._tensorboard is not None:
            for key, value in scalars.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.write(step, scalars)


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
        # what a step that trains on nothing waits for was read beside the one before, and may be more than it took
        wait = min(100.0, 100 * metrics["data_wait_seconds"] / metrics["step_seconds"])
        if self.terminal or self.first or step % self.interval == 0 or step == self.steps:
            loss = "-" if metrics["loss"] is None else f"{metrics['loss']:.4f}"
            self.show(
                f"step {step}/{self.steps}  loss {loss}  {metrics['tokens_per_second']:,.0f} tokens/s  "
                f"data wait {wait:.1f} %  {time_left(left)} left"
            )
        self.first = False


def process_peak() -> int:
    """The largest memory that this process has held at once so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
