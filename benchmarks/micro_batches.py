"""The backward passes of a step by an engine, for what measures them without the trainer's loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mf_train.parallel.engine import Engine


def backward_passes(
    engine: Engine,
    micro_batches: Sequence[Tensor],
    global_batch_size: int,
    after: Callable[[], object] = lambda: None,
) -> Tensor:
    """Forward and backward of this rank's micro-batches of a step, each of token ids [rows, S + 1].

    Returns their part of the global batch's mean loss, a float64 []. `after` is called after each.
    """
    loss = torch.zeros((), dtype=torch.float64, device=micro_batches[0].device)
    for index, rows in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        share = len(rows) / global_batch_size
        loss += engine.backward(rows[:, :-1], rows[:, 1:], share=share, last=last)
        after()
    return loss
