"""Counts of the reads of every row of every table, taken on the device while the model runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.kernels import count_codes
from mf_train.model.memory import Hash


class ReadCounts:
    """Counts the codes of every hash in forward passes within `counting`, for tables `rank` K/P on of K.

    Tensor-parallel rank `rank` of `size` counts its own chunks and no other rank's. A pass that is run again in the
    backward pass, to recompute activations, is not counted again. `by_hash[name]` is int64 [K/P, 2**tau], a view of
    the flat `values`, which lies on the model's device and holds all of them.
    """

    def __init__(
        self, model: nn.Module, num_tables: int, device: torch.device, rank: int = 0, size: int = 1
    ) -> None:
        self.first, self.num_tables = rank * num_tables // size, num_tables // size
        hashes = {name: module for name, module in model.named_modules() if isinstance(module, Hash)}
        sizes = {name: self.num_tables * 2**module.bits for name, module in hashes.items()}
        self.values = torch.zeros(sum(sizes.values()), dtype=torch.int64, device=device)
        parts = self.values.split(list(sizes.values()))
        self.by_hash = {name: part.view(self.num_tables, -1) for name, part in zip(sizes, parts, strict=True)}
        self._counting = self._inside = False
        model.register_forward_pre_hook(self._enter)
        model.register_forward_hook(self._leave, always_call=True)
        for name, module in hashes.items():
            module.register_forward_hook(self._counter(self.by_hash[name]))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The model's forward passes within are counted."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def clear(self) -> None:
        self.values.zero_()

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside = self._counting

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._inside = False

    def _counter(self, counts: Tensor) -> Any:
        def count(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
            if self._inside:
                codes = outputs[0].detach()
                count_codes(codes.narrow(-1, self.first, self.num_tables), counts)

        return count
