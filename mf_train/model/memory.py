"""The two steps of a memory layer (Eq. 2-11): hash (features to codes and weights) and lookup (tables to features)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mf_train.config.model import Score
from mf_train.kernels import hash_codes, lookup, lookup_all
from mf_train.model.sums import num_chunks


class Hash(nn.Module):
    """Codes and weights of x [..., D], `bits` features a table: [..., K] integers and [..., K] floats.

    It has no parameters. Tensor parallelism replaces it by one that also sends codes and weights to the other ranks.
    """

    def __init__(self, bits: int, temperature: float, score: Score) -> None:
        super().__init__()
        self.bits = bits
        self.temperature = temperature
        self.score = score

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return hash_codes(x, x.shape[-1] // self.bits, self.temperature, self.score)


class Lookup(nn.Module):
    """K tables of 2^tau rows and O columns, and a bias (Eq. 11): codes and weights [..., K] -> [..., O]."""

    def __init__(self, num_tables: int, bits: int, features: int) -> None:
        super().__init__()
        self.chunk = features // num_chunks(features)  # columns; a rank has fewer chunks, no smaller ones
        self.tables = nn.Parameter(torch.empty(num_tables, 2**bits, features))
        self.bias = nn.Parameter(torch.empty(features))

    def chunks(self) -> int:
        """Chunks of columns over which the weights' gradient is summed."""
        return self.tables.shape[-1] // self.chunk

    def forward(self, codes: Tensor, weights: Tensor) -> Tensor:
        return lookup(codes, weights, self.tables, self.bias, chunks=self.chunks())


def lookup_each(codes: Tensor, weights: Tensor, lookups: Sequence[nn.Module]) -> list[Tensor]:
    """What each of several lookups of the same codes gives, in one pass over the codes where they are plain ones.

    One whose `forward` was replaced, as libraries do that bring its tables from elsewhere, is called.
    """
    plain = [module for module in lookups if isinstance(module, Lookup) and "forward" not in module.__dict__]
    if len(plain) < len(lookups):
        return [module(codes, weights) for module in lookups]
    tables, biases = [module.tables for module in plain], [module.bias for module in plain]
    return lookup_all(codes, weights, tables, biases, chunks=min(module.chunks() for module in plain))


@contextmanager
def record_codes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, keeps the codes of each hash's last forward pass, by the hash's name."""
    codes: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor]) -> None:
            codes[name] = outputs[0].detach()

        return hook

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, Hash):
                hooks.enter_context(module.register_forward_hook(keep(name)))
        yield codes
