"""What the kernels take that update numbers whose moments are held in fewer bytes (`mf_train.parallel.stored`).

`update(gradient, unit, master, first, second, rates, draw)` of `cpu_adamw` and `triton_adamw` is a step of AdamW
(Loshchilov and Hutter 2019, arXiv 1711.05101) in one pass: numbers are read as they are held, changed, and held again
in place, rounded at random where they are bfloat16 or int8. `mf_train.parallel.adamw` has the same in torch operations.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Held(NamedTuple):
    """Numbers [N] as `kind` has them.

    float32     float32 [N]
    bfloat16    bfloat16 [N]
    int8        int8 (first moment) or uint8 (second) [N], and float32 [N / unit]: the largest magnitude of a unit
    row         float32 [N / unit]; second moments only
    split       bfloat16 [N], and int16 [N]: what it lacks of the number's bits; masters only
    """

    kind: str
    tensors: tuple[Tensor, ...]


def layout(kind: str, numel: int, unit: int, *, second: bool = False) -> list[tuple[torch.dtype, int]]:
    """Dtype and elements of each tensor of `Held`; `second`: of a second moment."""
    of_unit = (torch.float32, numel // unit)
    layouts = {
        "float32": [(torch.float32, numel)],
        "bfloat16": [(torch.bfloat16, numel)],
        "int8": [(torch.uint8 if second else torch.int8, numel), of_unit],
        "row": [of_unit],
        "split": [(torch.bfloat16, numel), (torch.int16, numel)],
    }
    return layouts[kind]


class Rates(NamedTuple):
    """The factors of a step."""

    keep: float  # of a master: 1 - learning rate * weight decay
    rate: float  # learning rate / (1 - beta1^step)
    new_share: float  # 1 - beta1
    beta2: float
    new_square: float  # 1 - beta2
    root_of_share: float  # sqrt(1 - beta2^step)
    epsilon: float

    @classmethod
    def of_step(
        cls, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float, step: int
    ) -> "Rates":
        """`step` counts from 1."""
        beta1, beta2 = betas
        return cls(
            keep=1 - learning_rate * weight_decay,
            rate=learning_rate / (1 - beta1**step),
            new_share=1 - beta1,
            beta2=beta2,
            new_square=1 - beta2,
            root_of_share=math.sqrt(1 - beta2**step),
            epsilon=epsilon,
        )


class Draw(NamedTuple):
    """What random bits are a function of, besides the number's place in its unit.

    Unit u of these numbers is unit o // mine * units + o % mine + first of the whole parameter, o = begin + u.
    """

    low: int  # two keys below 2^32
    high: int
    begin: int
    mine: int
    units: int
    first: int

    @property
    def signed_keys(self) -> tuple[int, int]:
        """Both keys as int32 of the same bits."""
        low, high = (key - (key >> 31 << 32) for key in (self.low, self.high))
        return low, high
