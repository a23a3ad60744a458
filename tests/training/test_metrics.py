"""A run's records over several starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mf_train.config.loading import parse_config
from mf_train.training.metrics import Records
from tests.training.runs import read_metrics


def record(step: int, loss: float) -> dict[str, Any]:
    return {
        "step": step,
        "loss": loss,
        "tokens_per_second": 1.0,
        "step_seconds": 1.0,
        "data_wait_seconds": 0.0,
    }


def test_steps_that_are_trained_again_are_single(tmp_path: Path) -> None:
    """In metrics.jsonl and for TensorBoard's own reader, after going back to step 3 and then to 0."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = parse_config({"training": {"output_dir": str(tmp_path)}}, "here")
    expected: dict[int, float] = {}
    for start, (after, last) in enumerate([(0, 6), (3, 5), (5, 9), (0, 4)]):
        records = Records(config, rank=0)
        records.open(after)
        expected = {step: loss for step, loss in expected.items() if step <= after}
        for step in range(after + 1, last + 1):
            expected[step] = float(100 * start + step)
            records.write(record(step, expected[step]))
        records.close()
        assert {one["step"]: one["loss"] for one in read_metrics(tmp_path)} == expected
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(event.step, event.value) for event in events.Scalars("loss")] == list(expected.items())
