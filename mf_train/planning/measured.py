"""What a run measured, beside what the planner says of it."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.planning.work import step_tokens
from mf_train.run_folder import METRICS, read_metrics

_WARM_UP = 3  # steps of a start that are left out where there are more


@dataclass(frozen=True)
class MeasuredRun:
    """Of one run: the median step and the peak of rank 0."""

    steps: int
    step_seconds: float
    peak_bytes: float | None


def read_measured(run: Path, config: Config) -> MeasuredRun:
    """From the run folder's metrics.jsonl: of the steps that have as many tokens as the configuration says.

    Raises UserError where there is none.
    """
    path = run / METRICS
    if not path.is_file():
        raise UserError(f"--measured {run}: {path} does not exist: give a run's folder")
    steps, before = [], 0
    for record in read_metrics(run):
        try:
            steps.append((float(record["step_seconds"]), record["tokens"] - before, record))
            before = record["tokens"]
        except (ValueError, KeyError, TypeError):
            continue  # not a step's
    if not steps:
        raise UserError(f"--measured {run}: {path} has no step yet")
    tokens = step_tokens(config)
    records = [each for each in steps if each[1] == tokens]
    if not records:
        raise UserError(
            f"--measured {run}: its steps have {steps[-1][1]:,.0f} tokens and the configuration's {tokens:,}: give "
            "the configuration that it ran"
        )
    counted = records[_WARM_UP:] or records
    peaks = [record["peak_memory_bytes"] for _, _, record in records if "peak_memory_bytes" in record]
    return MeasuredRun(len(counted), statistics.median(one[0] for one in counted), max(peaks, default=None))
