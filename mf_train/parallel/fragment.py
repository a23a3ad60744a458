"""What a rank keeps of the numbers behind a parameter, whatever the ZeRO stage."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mf_train.parallel.stored import Stored


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter whose master weights and moments this rank keeps.

    `start` is its place in the parameter's own elements, in row-major order. `values` has each of `kept_kinds`; what
    lies behind the first `numel` of them is padding.
    """

    start: int
    numel: int
    values: Mapping[str, Stored]
    gradient: Tensor | None = None  # float32, padding included; None under stage 3, which drops it

    def held(self, kind: str) -> Stored:
        """One of `kept_kinds`, without padding."""
        return self.values[kind].narrow(0, self.numel)
