"""What a run's metrics.jsonl tells: each number over the steps, and what happened at which step."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mf_train.run_folder import METRICS, parse_record


class Event(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str  # phase, resumed, skipped or alarm
    text: str


class Curve:
    """A number over the steps that have it, 16 bytes a point."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.values = array("d")

    def cut(self, step: int) -> None:
        """Forget this step and later ones."""
        place = bisect_left(self.steps, step)
        del self.steps[place:], self.values[place:]


@dataclass
class History:
    """A run's curves by the names of their numbers, those in objects joined by dots (`tables.<hash>.entropy`)."""

    curves: dict[str, Curve] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # the newest record


def read_history(run: Path) -> History:
    """Read a run's metrics, one line at a time. Raises OSError.

    A step that stands in the file again, and all after it, count as they were trained the last time.
    """
    history, newest = History(), 0
    with (run / METRICS).open("rb") as file:
        for line in file:
            record = parse_record(line)
            step = record.get("step")
            if not isinstance(step, int):
                continue
            if step <= newest:
                history.events = [event for event in history.events if event.step < step]
                for curve in history.curves.values():
                    curve.cut(step)
                history.last = {}
            phase = record.get("phase")
            if phase != history.last.get("phase", phase):
                history.events.append(Event(step, "phase", f"phase {phase} begins"))
            newest, history.last = step, record
            for name, value in _numbers(record):
                curve = history.curves.setdefault(name, Curve())
                curve.steps.append(step)
                curve.values.append(value)
            history.events += _events(step, record)
    # a curve is empty where the run went back to before its first point, such as its first validation
    history.curves = {name: curve for name, curve in history.curves.items() if curve.steps}
    return history


def _numbers(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def _events(step: int, record: dict[str, Any]) -> Iterator[Event]:
    if "resumed_after" in record:
        yield Event(step, "resumed", f"resumed after step {record['resumed_after']}")
    if "skipped" in record:
        yield Event(step, "skipped", f"not trained on: {record['skipped']}")
    for alarm in record.get("alarms", ()):
        tables = ", ".join(map(str, alarm["tables"]))
        yield Event(step, "alarm", f"{alarm['hash']}: tables {tables}: {', '.join(alarm['because'])}")
