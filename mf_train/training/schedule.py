"""The learning rate of a step."""

import math

from mf_train.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """Rate of step 1 ... `steps`: linear warm-up to `peak`, then constant or a cosine that ends at its last step.

    Warm-up is `warmup_steps`, by default 1 % of the steps (at least one).
    """
    warmup = schedule.warmup_steps if schedule.warmup_steps is not None else max(1, round(steps / 100))
    if step <= warmup:
        return peak * step / warmup
    if schedule.kind == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    lowest = schedule.minimum_fraction
    return peak * (lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress)))
