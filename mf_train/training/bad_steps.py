"""Steps whose update is left out: those that the user lists, that are not finite, and that stand out.

A step stands out where its loss or its gradient's norm is above

    m + k 1.4826 median |x_i - m|,   m = median x_i

x_i: that number in the last 128 updates, at least 64; k: `training.skip_spikes`. 1.4826 makes the median distance the
standard deviation of what is normally distributed (Rousseeuw and Croux 1993, J. Am. Stat. Assoc. 88). So skips
OLMo-core's SkipStepOptimizer, with k = 6, the same 128, and the mean and standard deviation of all steps; medians of
those that were accepted do not grow with the spikes that they are to find. What PaLM did (Chowdhery et al. 2022,
arXiv 2204.02311, section 5.1), to go back some 100 steps and leave out 200 to 500 batches, is `checkpoint.resume` with
`data.skip_steps`.
"""

import math
from collections import deque
from statistics import median
from typing import Any, NamedTuple

from mf_train.config import Config
from mf_train.config.bounds import step_ranges

WINDOW = 128  # accepted steps; fewer than half of them say too little
SPIKES_IN_A_ROW = 32  # more are no spikes: weights or data have changed
LISTED = "in data.skip_steps"


class Bad(NamedTuple):
    """What speaks against an update."""

    reason: str
    ends: bool  # so many were bad before that the run ends


class BadSteps:
    """Judges the steps of a run. All ranks give the same numbers and come to the same judgement.

    `state`: of the checkpoint that the run goes on from, so that a restart judges as the uninterrupted run. It is kept
    whether the rule is on or not, so that the rule can be switched on at a restart.
    """

    def __init__(self, config: Config, state: dict[str, Any]) -> None:
        self.listed = step_ranges(config.data.skip_steps)
        self.not_finite_in_a_row = config.training.skip_nonfinite
        self.factor = config.training.skip_spikes
        self.losses = deque(state.get("losses", ()), WINDOW)
        self.norms = deque(state.get("norms", ()), WINDOW)
        self.in_a_row: int = state.get("in_a_row", 0)  # bad ones, up to now

    def is_listed(self, step: int) -> bool:
        return any(step in each for each in self.listed)

    def judge(self, step: int, loss: float, norm: float) -> Bad | None:
        """None where the step is good, and from then on one of those that others are compared with."""
        if self.is_listed(step):
            return Bad(LISTED, ends=False)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                return self._bad(f"{name} is {value}", self.not_finite_in_a_row)
        for name, value, before in (("loss", loss, self.losses), ("gradient norm", norm, self.norms)):
            if self.factor and len(before) >= WINDOW // 2 and value > (limit := self._bound(before)):
                return self._bad(f"{name} is {value:.6g}, above {limit:.6g}", SPIKES_IN_A_ROW)
        self.losses.append(loss)
        self.norms.append(norm)
        self.in_a_row = 0
        return None

    def state(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "norms": list(self.norms), "in_a_row": self.in_a_row}

    def _bad(self, reason: str, at_most: int) -> Bad:
        self.in_a_row += 1
        return Bad(reason, ends=self.in_a_row > at_most)

    def _bound(self, before: deque[float]) -> float:
        middle = median(before)
        return middle + self.factor * 1.4826 * median(abs(value - middle) for value in before)
