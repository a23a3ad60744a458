"""The phases of a run: from a phase's first step on, some keys have other values.

A phase builds upon the one before it: its keys replace those before by name, lists as a whole. `schedule` is replaced
as a whole, and counts from the phase's first step to the last one before the next phase that has a schedule, or to the
run's last; without one the schedule before goes on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any

from mf_train.config.sections import Config, DataConfig, OptimizerConfig, PhaseConfig, ScheduleConfig
from mf_train.config.typed import build
from mf_train.errors import UserError
from mf_train.text import did_you_mean

MAIN = "main"  # the name of the steps before the first phase


@dataclass(frozen=True)
class Phase:
    """Steps of a run that have one configuration."""

    name: str
    first: int  # of its steps, which count from 1
    last: int
    config: Config  # of these steps, itself without phases
    schedule_steps: range  # over which its schedule counts: they may begin before the phase and end after it

    @property
    def num_steps(self) -> int:
        """Steps that it lasts."""
        return self.last - self.first + 1


def _keys(section: type, *fixed: str) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(section) if field.name not in fixed)


# What a phase may change. Everything else is the run's: its model, processes, length, folder and numbers.
CHANGEABLE = {
    "model": ("sequence_length",),
    "data": _keys(DataConfig, "skip_steps"),
    "optimizer": _keys(OptimizerConfig),
    "schedule": _keys(ScheduleConfig, "on_change"),
    "training": (
        "global_batch_size",
        "micro_batch_size",
        "recompute",
        "validation_interval",
        "validation_sequences",
        "z_loss",
        "skip_nonfinite",
        "skip_spikes",
    ),
}


def phases_of(config: Config, origin: str = "phases") -> tuple[Phase, ...]:
    """A run's phases, one at least, the first from step 1 on. `origin` is named in errors.

    Raises UserError where `phases` do not follow each other within the run, or change what they may not.
    """
    _check_order(config, origin)
    steps = config.training.steps
    starts = [1, *(phase.start for phase in config.phases), steps + 1]
    scheduled = [1, *(phase.start for phase in config.phases if phase.schedule), steps + 1]
    schedules = [range(first, after) for first, after in pairwise(scheduled)]
    names = [MAIN, *(phase.name for phase in config.phases)]
    here = replace(config, phases=())
    tree = dataclasses.asdict(here)
    found = []
    for index, (first, after) in enumerate(pairwise(starts)):
        if index > 0:
            tree = _changed(tree, config.phases[index - 1], f"{origin}: phases[{index - 1}]")
            here = build(Config, tree, "", f"{origin}: phases[{index - 1}]")
        counted = next(each for each in schedules if first in each)
        found.append(Phase(names[index], first, after - 1, here, counted))
    return tuple(found)


def phase_at(config: Config, step: int) -> Phase:
    """The phase of a step, from 1; before and after the run's steps the first and the last."""
    return next(phase for phase in reversed(phases_of(config)) if phase.first <= max(1, step))


def resolve_phases(config: Config, phases: Sequence[Phase]) -> Config:
    """The configuration with its phases' values as `phases_of` has read them: typed, and with paths expanded, as what
    is recorded must not depend on who reads it.
    """
    trees = [dataclasses.asdict(phase.config) for phase in phases[1:]]
    found = []
    for phase, tree in zip(config.phases, trees, strict=True):
        sections: dict[str, Any] = {
            name: {key: tree[name][key] for key in getattr(phase, name)} for name in CHANGEABLE
        }
        found.append(replace(phase, **sections))
    return replace(config, phases=tuple(found))


def changed_keys(before: Config, after: Config) -> list[str]:
    """The keys that a phase may change and that are not the same, as section.key."""
    keys = [f"{section}.{key}" for section, keys in CHANGEABLE.items() for key in keys]
    return [key for key in keys if attrgetter(key)(before) != attrgetter(key)(after)]


@contextmanager
def named(phase: Phase) -> Iterator[None]:
    """A UserError within says of which phase it is, but for the run's first steps."""
    try:
        yield
    except UserError as error:
        if phase.name == MAIN:
            raise
        raise UserError(f"phase {phase.name!r}: {error}") from None


def _changed(tree: dict[str, Any], phase: PhaseConfig, origin: str) -> dict[str, Any]:
    """The configuration's tree of a phase, of that before it."""
    changes = {section: getattr(phase, section) for section in CHANGEABLE}
    for section, keys in changes.items():
        for key in keys:
            if key not in CHANGEABLE[section]:
                hint = did_you_mean(key, CHANGEABLE[section], f"it may have {', '.join(CHANGEABLE[section])}")
                raise UserError(f"{origin}: a phase cannot change {section}.{key}: {hint}")
    if schedule := changes.pop("schedule"):
        tree = tree | {"schedule": {"on_change": tree["schedule"]["on_change"]} | schedule}
    return tree | {section: tree[section] | keys for section, keys in changes.items()}


def _check_order(config: Config, origin: str) -> None:
    names, before, steps = {MAIN}, 1, config.training.steps
    for index, phase in enumerate(config.phases):
        where = f"{origin}: phases[{index}]"
        if not phase.name or phase.name in names:
            raise UserError(
                f"{where}.name is {phase.name!r}: give each phase a name of its own, other than {MAIN!r}"
            )
        if not before < phase.start <= steps:
            raise UserError(
                f"{where}.start is {phase.start}: a phase begins after step {before}, with which the one before it "
                f"begins, and not after training.steps {steps}"
            )
        names.add(phase.name)
        before = phase.start
