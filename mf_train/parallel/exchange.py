"""Collectives of tensor-parallel ranks: of codes with weights, of sums, and of features before the head."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.parallel.collectives import collective

# torch 2.13 renamed these two and warns at every use of the old names
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """Collectives of one tensor-parallel group, and the bytes that this rank has sent in them.

    Bytes are those of a ring: in an all-gather or a reduce-scatter every rank sends P - 1 shards.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.bytes_sent = 0

    def all_gather(self, shard: Tensor) -> Tensor:
        """This rank's [...] -> every rank's [P, ...], in rank order."""
        shard = shard.contiguous()
        gathered = torch.empty((self.size, *shard.shape), dtype=shard.dtype, device=shard.device)
        with collective("tensor-parallel all-gather", shard.device):
            _all_gather(gathered.view(-1), shard.view(-1), group=self.group)
        self.bytes_sent += (self.size - 1) * shard.nbytes
        return gathered

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Sum over ranks of parts[rank]: [P, ...] -> [...].

        Parts in 16 bits are sent as they are, summed in float32 and rounded once: a collective that adds on the way
        would round P - 1 times.
        """
        parts = parts.contiguous()
        self.bytes_sent += (self.size - 1) * parts[0].nbytes
        if parts.dtype == torch.float32:
            shard = torch.empty(parts.shape[1:], dtype=parts.dtype, device=parts.device)
            with collective("tensor-parallel reduce-scatter", parts.device):
                _reduce_scatter(shard.view(-1), parts.view(-1), group=self.group)
            return shard
        received = torch.empty_like(parts)
        with collective("tensor-parallel all-to-all", parts.device):
            dist.all_to_all_single(received.view(torch.uint8), parts.view(torch.uint8), group=self.group)
        return received.sum(0, dtype=torch.float32).to(parts.dtype)

    def gather_values(self, values: Tensor) -> Tensor:
        """This rank's [...] -> every rank's in rank order, on a new last dimension [..., P]; without gradient."""
        return self.all_gather(values).movedim(0, -1)


def gather_codes(codes: Tensor, weights: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """Codes and weights of this rank's chunks [..., K/P] -> of all chunks [..., K]; one collective carries both.

    The backward is a reduce-scatter of the weights' gradient, K values a token, in the weights' dtype.
    """
    return _GatherCodes.apply(codes, weights, exchange)  # type: ignore[no-any-return]


def gather_features(x: Tensor, exchange: Exchange) -> Tensor:
    """Features of this rank [..., D/P] -> all features [..., D]; the backward is a reduce-scatter."""
    return _GatherFeatures.apply(x, exchange)  # type: ignore[no-any-return]


def _join(parts: Tensor) -> Tensor:
    """[P, ..., k] -> [..., P * k]."""
    return parts.movedim(0, -2).flatten(-2)


def _cut(whole: Tensor, size: int) -> Tensor:
    """[..., P * k] -> [P, ..., k]."""
    return whole.unflatten(-1, (size, -1)).movedim(-2, 0)


class _GatherCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, weights: Tensor, exchange: Exchange) -> Any:
        ctx.exchange = exchange
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
        return all_codes, all_weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return None, ctx.exchange.reduce_scatter(_cut(gradients[1], ctx.exchange.size)), None


class _GatherFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _join(exchange.all_gather(x))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.exchange.reduce_scatter(_cut(gradients[0], ctx.exchange.size)), None
