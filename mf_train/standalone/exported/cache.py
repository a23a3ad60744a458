"""Keys and values that grow in place: a new position costs its own bytes, not a copy of all earlier ones.

This file needs torch alone; a converted model carries a copy of it.
"""

import torch
from torch import Tensor

SPARE = 64  # positions of room that a buffer has at least when it is made


class Growing:
    """A tensor [B, H, T, head] at the front of a buffer [B, H, capacity, head] with room for more positions.

    Any tensor may be put in its place with `hold`; it is copied when the next position needs room.
    """

    def __init__(self) -> None:
        self.buffer: Tensor | None = None
        self.length = 0

    def held(self) -> Tensor | None:
        """The positions so far, a view [B, H, T, head] that later positions leave as it is; None before the first."""
        return None if self.buffer is None else self.buffer[:, :, : self.length]

    def hold(self, tensor: Tensor | None) -> None:
        """Hold `tensor` instead: a shorter view of the same buffer drops its last positions, and None all."""
        buffer = self.buffer
        if tensor is None or buffer is None or not _is_front(tensor, buffer):
            self.buffer = tensor
        self.length = 0 if tensor is None else tensor.shape[2]

    def append(self, new: Tensor) -> Tensor:
        """Add positions [B, H, S, head]; returns all of them."""
        before = self.held()
        compiling = torch.compiler.is_compiling()  # which does not see memory, only tensors
        if compiling or new.requires_grad or (before is not None and not _fits(new, before)):
            # autograd's, or of another dtype or shape: as torch.cat has it
            all_positions = new if before is None else torch.cat((before, new), dim=2)
            self.buffer, self.length = all_positions, all_positions.shape[2]
            return all_positions
        buffer = self.reserve((*new.shape[:2], new.shape[3]), new.shape[2], new.dtype, new.device)
        buffer[:, :, self.length : self.length + new.shape[2]] = new
        self.length += new.shape[2]
        return buffer[:, :, : self.length]

    def reserve(
        self, shape: tuple[int, int, int], count: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The buffer, contiguous, with room for `count` more positions; made for (B, H, head) where there is none."""
        buffer, needed = self.buffer, self.length + count
        frozen = buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled()
        if buffer is None or buffer.shape[2] < needed or frozen or not buffer.is_contiguous():
            batch, heads, size = shape
            capacity = needed + max(needed // 2, SPARE)
            grown = torch.empty((batch, heads, capacity, size), dtype=dtype, device=device)
            if buffer is not None:
                grown[:, :, : self.length] = buffer[:, :, : self.length]
            self.buffer = buffer = grown
        return buffer


class Cache:
    """Keys and values, or states, of all layers: what the model calls a StateCache."""

    def __init__(self, layers: int) -> None:
        self.keys = [Growing() for _ in range(layers)]
        self.values = [Growing() for _ in range(layers)]
        self.states: list[tuple[Tensor, ...] | None] = [None] * layers
        self.kept = [0] * layers  # positions whose state a layer has

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer].append(key), self.values[layer].append(value)

    def state(self, layer: int) -> tuple[Tensor, ...] | None:
        return self.states[layer]

    def keep(self, layer: int, state: tuple[Tensor, ...], positions: int) -> None:
        self.states[layer] = state
        self.kept[layer] += positions

    def get_seq_length(self) -> int:
        return self.keys[0].length + self.kept[0]  # the first layer has one of both


def _is_front(tensor: Tensor, buffer: Tensor) -> bool:
    """Whether `tensor` is the first positions of `buffer`, in its memory."""
    return (
        tensor.data_ptr() == buffer.data_ptr()
        and tensor.dtype == buffer.dtype
        and tensor.stride() == buffer.stride()
        and tensor.shape[:2] == buffer.shape[:2]
        and tensor.shape[2] <= buffer.shape[2]
        and tensor.shape[3] == buffer.shape[3]
    )


def _fits(new: Tensor, before: Tensor) -> bool:
    return (
        new.dtype == before.dtype
        and new.device == before.device
        and (*new.shape[:2], new.shape[3]) == (*before.shape[:2], before.shape[3])
        and not before.requires_grad
    )
