"""Collectives of tensor-parallel ranks: of codes with weights, of sums, and of features before the head.

What ranks add up are nodes of a tree (`mf_train.model.sums`), so no collective adds: nodes travel whole, in float32,
and every rank adds those that it gets by neighbouring pairs. So training has the same bits for every number of ranks.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.model.sums import pairwise_sum
from mf_train.parallel.collectives import collective

# torch 2.13 renamed these two and warns at every use of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(whole: Tensor, shard: Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Start to fill `whole` [R n] with every rank's `shard` [n], which may lie in its place in `whole`.

    `group` None: all ranks.
    """
    return _all_gather(whole, shard, group=group, async_op=True)


def reduce_scatter(shard: Tensor, whole: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to fill `shard` [n] with the sum over ranks of this rank's part of their `whole` [R n]."""
    return _reduce_scatter(shard, whole, group=group, async_op=True)


def all_to_all(received: Tensor, sent: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to fill part r of `received` [R n] with this rank's part of what rank r sends, of any dtype."""
    return dist.all_to_all_single(
        received.view(torch.uint8), sent.view(torch.uint8), group=group, async_op=True
    )


class Exchange:
    """Collectives of one tensor-parallel group, and the bytes that this rank has sent in them.

    Bytes of an all-gather are those of a ring, P - 1 shards; as many are sent where every rank sends one to each other.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.bytes_sent = 0
        self._kept: deque[Tensor] | None = None  # where all-gathers leave a reference to what they received
        self._repeated: deque[Tensor] | None = None  # what they take instead of sending

    def keep_and_repeat(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Within the first, what all-gathers receive is kept; within the second the same calls get it and send nothing.

        For a forward pass that is run again to recompute activations (`context_fn` of torch.utils.checkpoint).
        """
        received: deque[Tensor] = deque()
        return self._with("_kept", received), self._with("_repeated", received)

    @contextmanager
    def _with(self, name: str, received: deque[Tensor]) -> Iterator[None]:
        setattr(self, name, received)
        try:
            yield
        finally:
            setattr(self, name, None)

    def all_gather(self, shard: Tensor) -> Tensor:
        """This rank's [...] -> every rank's [P, ...], in rank order."""
        if self._repeated is not None:
            return self._repeated.popleft()
        shard = shard.contiguous()
        gathered = torch.empty((self.size, *shard.shape), dtype=shard.dtype, device=shard.device)
        with collective("tensor-parallel all-gather", shard.device):
            _all_gather(gathered.view(-1), shard.view(-1), group=self.group)
        self.bytes_sent += (self.size - 1) * shard.nbytes
        if self._kept is not None:
            self._kept.append(gathered)
        return gathered

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Sum over ranks of parts[rank], by neighbouring pairs of ranks: [P, ...] -> [...], P a power of two."""
        parts = parts.contiguous()
        self.bytes_sent += (self.size - 1) * parts[0].nbytes
        received = torch.empty_like(parts)
        with collective("tensor-parallel all-to-all", parts.device):
            dist.all_to_all_single(received, parts, group=self.group)
        return pairwise_sum(received.movedim(0, -1))

    def gather_values(self, values: Tensor) -> Tensor:
        """This rank's [...] -> every rank's in rank order, on a new last dimension [..., P]; without gradient."""
        return self.all_gather(values).movedim(0, -1)


def gather_codes(codes: Tensor, weights: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Codes and weights of this rank's chunks [..., K/P] -> of all chunks [..., K]; one collective carries both.

    Weights of 16 bits arrive as float32, with the same values, so that their gradient, which is this rank's node of a
    sum over all columns, comes back in float32. The backward is a reduce-scatter of it, K values a token.
    """
    return _GatherCodes.apply(codes, weights, exchange)  # type: ignore[no-any-return]


def gather_features(x: Tensor, exchange: Exchange) -> Tensor:
    """Features of this rank [..., D/P] -> all features [..., D]; without gradient."""
    return _join(exchange.all_gather(x))


def mix_features(x: Tensor, exchange: Exchange) -> Tensor:
    """`gather_features` for layers of which each rank computes some outputs: the backward pass is a reduce-scatter of
    what these outputs give, in float32.
    """
    return _MixFeatures.apply(x, exchange)  # type: ignore[no-any-return]


def scatter_features(parts: Tensor, exchange: Exchange) -> Tensor:
    """This rank's part of a value of all features [..., D] -> the sum over ranks of this rank's features [..., D/P]."""
    return exchange.reduce_scatter(_cut(parts, exchange.size))


def _join(parts: Tensor) -> Tensor:
    """[P, ..., k] -> [..., P * k]."""
    return parts.movedim(0, -2).flatten(-2)


def _cut(whole: Tensor, size: int) -> Tensor:
    """[..., P * k] -> [P, ..., k]."""
    return whole.unflatten(-1, (size, -1)).movedim(-2, 0)


class _GatherCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, weights: Tensor, exchange: Exchange) -> Any:
        ctx.exchange, ctx.dtype = exchange, weights.dtype
        # 16-bit codes come as int32 (torch computes little with uint16); they travel in two bytes
        narrow = codes.to(torch.int16) if codes.dtype == torch.int32 else codes
        packed = torch.cat((weights.view(torch.uint8), narrow.view(torch.uint8)), dim=-1)
        gathered = exchange.all_gather(packed)
        border = weights.shape[-1] * weights.element_size()
        all_weights = _join(gathered[..., :border].contiguous().view(weights.dtype))
        all_codes = _join(gathered[..., border:].contiguous().view(narrow.dtype))
        if narrow is not codes:
            all_codes = all_codes.to(codes.dtype) & 0xFFFF
        ctx.mark_non_differentiable(all_codes)
        ctx.set_materialize_grads(False)  # no zeros for the codes' gradient, which does not exist
        return all_codes, all_weights.to(torch.promote_types(weights.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, scatter_features(gradients[1], ctx.exchange).to(ctx.dtype), None


class _MixFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return gather_features(x, exchange)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        wide = torch.promote_types(gradients[0].dtype, torch.float32)
        return scatter_features(gradients[0].to(wide), ctx.exchange).to(gradients[0].dtype), None
