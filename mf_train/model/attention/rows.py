"""Rows with padding: their tokens first, and back."""

from collections.abc import Callable

import torch
from torch import Tensor

from mf_train.model.attention.base import State

AttendRows = Callable[[Tensor, Tensor, Tensor, Tensor, State | None], tuple[Tensor, State]]


def take(x: Tensor, index: Tensor) -> Tensor:
    """Positions of each row: x [B, H, T, C], index [B, S] of integers in [0, T) -> [B, H, S, C]."""
    return x.gather(2, index[:, None, :, None].expand(*x.shape[:2], index.shape[1], x.shape[3]))


def attend_tokens_first(
    attend: AttendRows, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
) -> tuple[Tensor, State]:
    """y [B, H, S, head] and the state of `attend(q, k, v, lengths, state)`, which gets the tokens of a row first.

    `lengths` [B] are their numbers. What lies behind them is padding, whose y is of no meaning. padding [B, S] is 0 at
    padding, wherever in a row that is.
    """
    if padding is None:
        return attend(q, k, v, torch.full(q.shape[:1], q.shape[2], device=q.device), state)
    order = (padding == 0).to(torch.uint8).argsort(stable=True, dim=-1)
    q, k, v = (take(x, order) for x in (q, k, v))
    y, state = attend(q, k, v, (padding != 0).sum(-1), state)
    return take(y, order.argsort(-1)), state
