"""The collectives that a process starts, counted as torch dispatches them: what a step sends, and when.

`python -m benchmarks.collectives` trains a small model under each ZeRO stage, in each precision and on 1, 2 and 4 ranks
of this machine, and prints for each case a step's collectives, bytes by dtype, the share that was sent before the
backward pass had ended, and the step's seconds. Ranks share the machine's processors: seconds compare cases alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# c10d operators: the collective's name, which tensor is the whole, and how often it goes round the ring of R ranks
_KINDS = {
    "allreduce_": ("all_reduce", 2),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 1),
    "reduce_": ("reduce", 1),
}


@dataclass(frozen=True)
class Call:
    """A collective: its whole tensor, and when it was started."""

    name: str
    dtype: str
    elements: int
    sent_bytes: float  # by a rank, as of a ring
    seconds: float  # time.perf_counter() at its start
    during_backward: bool


class Collectives(TorchDispatchMode):
    """Within the block, records the collectives of this thread in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        if namespace == "c10d" and name in _KINDS:
            self._note(name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: tuple[Any, ...]) -> None:
        name, passes = _KINDS[operator]
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        groups = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
        ranks = next(size for group in groups if (size := _size(group)))
        whole = max(tensors, key=lambda tensor: tensor.numel())
        self.calls.append(
            Call(
                name,
                str(whole.dtype).removeprefix("torch."),
                whole.numel(),
                passes * whole.nbytes * (ranks - 1) / ranks,
                self.now(),
                torch._C._current_graph_task_id() != -1,
            )
        )


def _size(group: torch.ScriptObject) -> int:
    from torch.distributed import ProcessGroup

    try:
        return ProcessGroup.unbox(group).size()
    except (RuntimeError, TypeError, ValueError):  # another object of c10d's, a ReduceOp
        return 0
