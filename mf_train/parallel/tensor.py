"""The plain model made tensor-parallel by one ordered function; the block's code stays what it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mf_train.config import ModelConfig
from mf_train.model import MemoryFormer
from mf_train.model.head import Head
from mf_train.model.initialise import initialise
from mf_train.model.matrix import Gather
from mf_train.model.memory import Hash
from mf_train.model.norm import Norm
from mf_train.model.product_key import ProductKeys
from mf_train.model.sharding import slice_of_rank
from mf_train.parallel.exchange import Exchange, gather_codes, gather_features, mix_features, scatter_features


def build_model(
    config: ModelConfig, exchange: Exchange | None, seed: int, device: torch.device
) -> MemoryFormer:
    """A MemoryFormer or dense peer with its initial weights, or this rank's part of one; no rank holds the whole."""
    with torch.device("meta"):
        model = MemoryFormer(config)
    if exchange is not None:
        shard_model(model, exchange)
    model.to_empty(device=device)
    initialise(model, seed, *((exchange.rank, exchange.size) if exchange is not None else (0, 1)))
    return model


def shard_model(model: MemoryFormer, exchange: Exchange) -> MemoryFormer:
    """Turn a plain MemoryFormer into this rank's part of a tensor-parallel one, in place.

    1. Every parameter becomes its slice (`split_dimension`): columns of tables and embedding, rows of matrices and
       head, features of norms and biases. Nothing is replicated. Meta tensors stay meta. A rank's features are whole
       heads.
    2. Norms exchange their sums. 3. Hashes and product keys exchange codes and weights. 4. Matrices and head gather
       features.
    Names of modules and parameters do not change. The degrees must have passed `check_degrees`.
    """
    _slice_parameters(model, exchange)
    _swap(model, Norm, lambda norm: TensorParallelNorm(norm, exchange))
    _swap(model, Hash, lambda hash_: TensorParallelHash(hash_, exchange))
    _swap(model, ProductKeys, lambda keys: TensorParallelProductKeys(keys, exchange))
    _swap(model, Gather, lambda _: TensorParallelGather(exchange))
    _swap(model, Head, lambda head: TensorParallelHead(head, exchange))
    return model


class TensorParallelNorm(Norm):
    """A Norm whose features are split over ranks: its two sums a token are gathered."""

    def __init__(self, plain: Norm, exchange: Exchange) -> None:
        with torch.device("meta"):
            super().__init__(plain.features, plain.kind, plain.epsilon)
        self.weight, self.bias = plain.weight, plain.bias
        self.gather = exchange.all_gather


class TensorParallelHash(Hash):
    """Hashes this rank's K/P chunks, then gathers the codes and weights of all K."""

    def __init__(self, plain: Hash, exchange: Exchange) -> None:
        super().__init__(plain.bits, plain.temperature, plain.score)
        self.exchange = exchange

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return gather_codes(*super().forward(x), self.exchange)


class TensorParallelProductKeys(ProductKeys):
    """Finds values for this rank's H/P heads, then gathers the codes and weights of all H."""

    def __init__(self, plain: ProductKeys, exchange: Exchange) -> None:
        nn.Module.__init__(self)
        self.reads, self.code_dtype = plain.reads, plain.code_dtype
        self.queries, self.keys = plain.queries, plain.keys
        self.exchange = exchange

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return gather_codes(*super().forward(x), self.exchange)


class TensorParallelGather(Gather):
    """Gathers the features of all ranks; the backward pass adds up each rank's part of their gradient."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def forward(self, x: Tensor) -> Tensor:
        return mix_features(x, self.exchange)


class TensorParallelHead(Head):
    """Holds V/P rows of the vocabulary: gathers the features, then a maximum and two sums a token."""

    def __init__(self, plain: Head, exchange: Exchange) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.vocab_size, plain.softcap)
        self.weight = plain.weight
        self.exchange = exchange
        self.first_token = exchange.rank * plain.weight.shape[0]

    def gather_features(self, x: Tensor) -> Tensor:
        return gather_features(x, self.exchange)

    def scatter_features(self, parts: Tensor) -> Tensor:
        return scatter_features(parts, self.exchange)

    def gather_sums(self, sums: Tensor) -> Tensor:
        return self.exchange.gather_values(sums)


def _slice_parameters(model: nn.Module, exchange: Exchange) -> None:
    for name, parameter in list(model.named_parameters()):
        part = slice_of_rank(parameter.detach(), name, exchange.rank, exchange.size).clone()
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, nn.Parameter(part))


def _swap(model: nn.Module, kind: type[nn.Module], build: Callable[[Any], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is kind:
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, build(module))
