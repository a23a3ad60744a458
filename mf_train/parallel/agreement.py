"""Failing together: what goes wrong on one rank ends all of them, and one rank says why."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from mf_train.errors import PeerError, UserError

T = TypeVar("T")


def together(action: Callable[[], T], device: torch.device) -> T:
    """Run an action without collectives on every rank, and wait for all.

    Where any rank raises UserError or OSError, the lowest such rank raises its error and every other rank raises
    PeerError with the same exit status. Collective over all ranks.
    """
    result: T | None = None
    failure: UserError | OSError | None = None
    try:
        result = action()
    except (UserError, OSError) as error:
        failure = error
    status = 0 if failure is None else 2 if isinstance(failure, UserError) else 1
    agree(status, failure, device)
    return result  # type: ignore[return-value]


def agree(status: int, failure: Exception | None, device: torch.device) -> None:
    """Raise if any rank's status is not 0, as `together` does."""
    none = 2**31 - 1
    rank = dist.get_rank()
    lowest = torch.tensor([rank * 4 + status if status else none], dtype=torch.int32, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    first = int(lowest.item())
    if first == none:
        return
    if first // 4 == rank and failure is not None:
        raise failure
    raise PeerError(first % 4)
