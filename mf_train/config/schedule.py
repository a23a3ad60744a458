"""The learning rate of a step.

Of step s of S, after W steps of warm-up, with the peak p, the lowest share m, and t = (s - W) / (S - W):

    cosine               p (m + (1 - m) (1 + cos(pi t)) / 2)       Loshchilov and Hutter 2017, arXiv 1608.03983
    linear               p (1 - (1 - m) t)                         Devlin et al. 2019, arXiv 1810.04805
    constant             p
    warmup_stable_decay  p, and over the last D steps to m p,      Hu et al. 2024, arXiv 2404.06395; a straight line
                         p (1 - (1 - m) (s - S + D) / D)           as in Hägele et al. 2024, arXiv 2405.18392
    inverse_sqrt         p sqrt(W / s), W at least 1               Vaswani et al. 2017, arXiv 1706.03762

In a phase with a schedule of its own (mf_train/config/phases.py), s and S count from the phase's first step.

A run that goes on with another schedule after step c, whose rate was r, may warm up again: up to step c + W its rates
are on the straight line from r to the schedule's rate at c + W.
"""

import math
from typing import NamedTuple

from mf_train.config.phases import Phase
from mf_train.config.sections import ScheduleConfig, decay_steps, warmup_steps


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of step 1 ... `steps`: linear warm-up to `peak`, then as the schedule's kind says."""
    warmup = warmup_steps(schedule, steps)
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "inverse_sqrt":
        return peak * math.sqrt(max(1, warmup) / step)
    first = warmup
    if schedule.kind == "warmup_stable_decay":
        first = steps - decay_steps(schedule, steps)
        if step <= first:
            return peak
    progress = min(1.0, (step - first) / max(1, steps - first))
    lowest = schedule.minimum_fraction
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (lowest + (1 - lowest) * falling)


class Rewarm(NamedTuple):
    """Where a line to a new schedule begins: a step that was trained, and its rate. Checkpoints keep it."""

    step: int
    rate: float


def rewarm_end(phase: Phase, rewarm: Rewarm) -> int:
    """The first step that has the schedule's rate again."""
    return rewarm.step + warmup_steps(phase.config.schedule, len(phase.schedule_steps))


def rate_of(phase: Phase, step: int, rewarm: Rewarm | None = None) -> float:
    """The rate of a step by the schedule and the peak of a phase; also of the step after the phase, had it gone on."""
    if rewarm is None or step >= (end := rewarm_end(phase, rewarm)):
        return _scheduled(phase, step)
    rise = _scheduled(phase, end) - rewarm.rate
    return rewarm.rate + rise * (step - rewarm.step) / (end - rewarm.step)


def _scheduled(phase: Phase, step: int) -> float:
    steps, config = phase.schedule_steps, phase.config
    return learning_rate(step - steps.start + 1, len(steps), config.optimizer.learning_rate, config.schedule)
