"""What a rank keeps of the numbers behind a parameter, whatever the ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names below are used where there may be no torch
    from torch import Tensor

    from mf_train.parallel.stored import Stored

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state beside its count of steps
KINDS = ("master", *MOMENTS)
# of each number and of each unit of numbers, by how they are held; a split master's are those beside its weight
BYTES = {"float32": (4, 0), "bfloat16": (2, 0), "int8": (1, 4), "row": (0, 4), "split": (2, 0)}
# numbers that an update turns into float32 at once: what a CPU's cache holds, few launches on a GPU
PIECE = {"cpu": 2**18, "cuda": 2**22}


def held_bytes(kind: str, unit: int = 1) -> float:
    """Bytes of a number that is held as `kind` (`mf_train.parallel.stored`) in units of `unit` numbers."""
    of_number, of_unit = BYTES[kind]
    return of_number + of_unit / unit


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose master weights and moments this rank keeps.

    `start` is its place in the parameter's own elements, in row-major order. `values` has each of KINDS; what lies
    behind the first `numel` of them is padding.
    """

    start: int
    numel: int
    values: Mapping[str, Stored]
    gradient: Tensor | None = None  # float32, padding included; None under stage 3, which drops it

    def held(self, kind: str) -> Stored:
        """One of KINDS, without padding."""
        return self.values[kind].narrow(0, self.numel)
