"""What all kinds of attention share: heads, their norm, the rotation, documents, the cache."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.attention.masks import Lengths
from mf_train.model.attention.rotary import Rotary, rotate_both
from mf_train.model.norm import HeadNorm

State = tuple[Tensor, ...]  # of earlier positions, each [B, ...]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class KeyValueCache(Protocol):
    """Keys and values of earlier positions, a layer at a time; `transformers`' caches fit."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H, S, head] of a layer and return all of them, [B, H, T, head]."""

    def get_seq_length(self) -> int:
        """Positions held so far."""


class StateCache(KeyValueCache, Protocol):
    """Also holds the states of layers whose attention is no softmax."""

    def state(self, layer: int) -> State | None:
        """What `keep` was given last; None before the first position."""

    def keep(self, layer: int, state: State, positions: int) -> None:
        """Hold `state` in place of the last one: it is that of so many positions more."""


class Context(NamedTuple):
    """Of one forward pass: what the attention of every block gets beside its queries, keys and values."""

    rotary: Rotary
    mask: Tensor | None = None  # softmax's alone: boolean (True: attend), or added to the scores
    padding: Tensor | None = None  # [B, S] of the new positions, 0 at padding: what all other kinds get
    documents: Lengths | None = None  # inside which attention is causal, where it is not in whole rows
    cache: KeyValueCache | None = None
    attentions: list[Tensor] | None = None  # gets the softmax of each block, [B, H, S, T]


class Attention(nn.Module):
    """Causal attention over whole heads, of one kind: [B, S, H * head] three times -> the same shape.

    The number of heads follows from the input, and heads never mix, so a rank that holds some of the heads runs the
    same code. With `model.qk_norm` queries and keys are normalised before the rotation. A kind is a subclass with
    `attend`, which is also given the positions in pieces of any length.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.query_norm: HeadNorm | None = None
        self.key_norm: HeadNorm | None = None
        if config.qk_norm:
            sizes = config.hidden_size, config.head_size
            self.query_norm = HeadNorm(*sizes, config.norm_epsilon)
            self.key_norm = HeadNorm(*sizes, config.norm_epsilon)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, context: Context) -> Tensor:
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query, key, value))
        q, k = rotate_both(q, k, context.rotary)
        return self.attend_within(q, k, v, context)

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """[B, H, S, head] three times -> [B, S, H * head]: in documents, after what the cache holds, or alone."""
        if context.documents is not None:
            return attend_in_documents(
                lambda q, k, v: self.attend(q, k, v, None, None)[0], q, k, v, context.documents
            )
        if context.cache is None:
            y, _ = self.attend(q, k, v, context.padding, None)
        else:
            cache = cast(StateCache, context.cache)
            y, state = self.attend(q, k, v, context.padding, cache.state(self.layer))
            cache.keep(self.layer, state, q.shape[2])
        return y.transpose(1, 2).flatten(-2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        """The next positions, [B, H, S, head] three times -> y [B, H, S, head] and the state after them.

        S is any number from 1 up. `padding` [B, S] is 0 where a position is padding, whose y is finite and otherwise
        of no meaning. `state`, what the call before returned, is None at the first position.
        """
        raise NotImplementedError


def attend_in_documents(attend: Attend, q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """`attend`, [1, H, L, head] three times -> [1, H, L, head], in each document alone.

    [B, H, S, head] three times -> [B, S, H * head]. A call for each document, so that what lies between documents is
    not computed; on GPUs too.
    """
    rows, _, length, _ = q.shape
    # one split of all tokens: its gradient is one concatenation, where slices would add up as many whole tensors
    parts = zip(*(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    results = []
    for part in parts:
        q, k, v = (x_lhd.transpose(0, 1)[None] for x_lhd in part)
        results.append(attend(q, k, v)[0].transpose(0, 1))
    return torch.cat(results).view(rows, length, -1)
