"""Decoding with one call of the C++ library a token, for plain models and for the copies that converted models carry.

A converted model's folder imports this module by its name, where this package is installed, and calls `FastPath` where
`INTERFACE` is the number that it knows. It relies on nothing else of it; a change of `FastPath`'s surface, or of what
the plain model computes, takes another number, and folders of the other number decode with torch's operations.
"""

import ctypes
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.host_memory import available_memory
from mf_train.kernels import cpu
from mf_train.kernels.decode import (
    DTYPES,
    MAX_BATCH,
    BlockTensors,
    Decoder,
    LookupTensors,
    ModelTensors,
    NormTensors,
)
from mf_train.model.attention.rotary import rotary_table

INTERFACE = 3

_PAGE = 4096
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14

# Classes by name, because a converted model has its own copies of them. Any other module takes the plain path.
_CLASSES = {
    "": {"MemoryFormer"},
    "embedding": {"Embedding"},
    "blocks": {"ModuleList"},
    "head": {"Head", "Int8Head"},
    "final_norm": {"Norm"},
}
_NORMS = ("norm_attention", "norm_ffn", "norm_inner")
_HASHES = ("hash_attention", "hash_ffn", "hash_inner")
_LOOKUPS = ("query", "key", "value", "up", "down")
_SOFTMAX = {"SoftmaxAttention", "Attention"}  # the second in models converted when there was no other kind
_BLOCK_CLASSES = {"": {"Block", "MemoryFormerBlock"}, "attention": _SOFTMAX}
_BLOCK_CLASSES |= {name: {"Norm"} for name in _NORMS} | {name: {"Hash"} for name in _HASHES}
_BLOCK_CLASSES |= {name: {"Lookup", "Int8Lookup"} for name in _LOOKUPS}
_HEAD_NORMS = ("query_norm", "key_norm")  # of attention, with `model.qk_norm`
_ACTIVATION_CLASSES = {"none": "Identity", "gelu": "GELU", "relu": "ReLU"}


class GrowingTensor(Protocol):
    """A layer's keys or values: `mf_train.standalone.exported.cache.Growing`, or a converted model's copy of it."""

    length: int

    def reserve(
        self, shape: tuple[int, int, int], count: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor: ...


class FastPath:
    """Decodes one token of every sequence with the C++ library; gives None where the library cannot decode the model.

    It keeps a decoder of the model that it saw last, and makes another when a module or tensor was replaced. Copies
    and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._decoder: _ModelDecoder | None = None
        self._refused: _Watch | None = None

    def __reduce__(self) -> Any:
        return FastPath, ()

    def logits(
        self,
        model: nn.Module,
        token_ids: Tensor,
        keys: Sequence[GrowingTensor],
        values: Sequence[GrowingTensor],
    ) -> Tensor | None:
        """Logits [B, V] of the next token after token_ids [B], without gradients; None: take the plain path.

        `keys` and `values` of each layer hold the earlier positions of every sequence, none of them padding, and take
        this one's. Raises IndexError for a token that is not in the vocabulary.
        """
        if token_ids.device.type != "cpu" or not 1 <= token_ids.shape[0] <= MAX_BATCH:
            return None
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        # local names: other threads of the same model may be here too
        decoder, refused = self._decoder, self._refused
        if decoder is None or not decoder.watch.unchanged(model):
            self._decoder = None
            if refused is not None and refused.unchanged(model):
                return None
            self._decoder = decoder = _make_decoder(model)
            self._refused = _Watch(model) if decoder is None else None
        return None if decoder is None else decoder.logits(token_ids, keys, values)


class _Watch:
    """Whether a model still has the modules, tensors, memory and hooks that it had."""

    def __init__(self, model: nn.Module) -> None:
        self._root = model
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._hooks: list[Any] = []
        for module in model.modules():
            for place in (module._modules, module._parameters, module._buffers):
                self._places += [place] * len(place)
                self._names += place
            self._hooks += (module._forward_hooks, module._forward_pre_hooks)
        self._objects = self._found()
        self.tensors = [value for value in self._objects if isinstance(value, Tensor)]
        self._pointers = self._addresses()
        self.hooked = any(self._hooks)

    def _found(self) -> list[Any]:
        return list(map(operator.getitem, self._places, self._names))

    def _addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def unchanged(self, model: nn.Module) -> bool:
        # about 0.1 us a tensor: every step can afford it
        try:
            return (
                model is self._root
                and all(map(operator.is_, self._found(), self._objects))
                and self._addresses() == self._pointers
                and any(self._hooks) == self.hooked
            )
        except KeyError:
            return False


class _ModelDecoder:
    """A decoder of a plain model's tensors, what it was made of, and the rotary angles of all positions."""

    def __init__(self, config: ModelConfig, decoder: Decoder, watch: _Watch) -> None:
        self.watch = watch
        self._config = config
        self._decoder = decoder
        self._rotary = self._angles(config.sequence_length)

    def _angles(self, length: int) -> tuple[Tensor, Tensor]:
        """[length, rotary_size / 2] each."""
        config = self._config
        positions = torch.arange(length, device="cpu")
        cosine, sine = rotary_table(positions, config.rotary_size, config.rotary_base)
        return cosine[0], sine[0]

    def logits(
        self, token_ids: Tensor, keys: Sequence[GrowingTensor], values: Sequence[GrowingTensor]
    ) -> Tensor | None:
        past = keys[0].length if keys else 0
        if any(part.length != past for part in (*keys, *values)):
            return None
        cosine, sine = self._rotary
        if past >= len(cosine):
            self._rotary = cosine, sine = self._angles(2 * past)
        decoder = self._decoder
        shape = (token_ids.shape[0], decoder.num_heads, decoder.head_size)
        buffers = [
            [part.reserve(shape, 1, decoder.dtype, token_ids.device) for part in parts]
            for parts in (keys, values)
        ]
        logits = decoder.step(
            token_ids.to(torch.int64).contiguous(), past, cosine[past], sine[past], *buffers
        )
        for part in (*keys, *values):
            part.length = past + 1
        return logits


def _make_decoder(model: Any) -> _ModelDecoder | None:
    """None where the model is on another device, in another dtype, changed, or there is no library."""
    watch = _Watch(model)
    config = model.config
    if watch.hooked or not _is_plain(model, config):
        return None
    if any(tensor.device.type != "cpu" or not tensor.is_contiguous() for tensor in watch.tensors):
        return None
    if model.embedding.weight.dtype not in DTYPES or cpu.library() is None:
        return None
    try:
        decoder = Decoder(_describe(model, config))
    except ValueError:  # tensors of several dtypes, or of other sizes than the configuration's
        return None
    _map_pages(watch.tensors)
    return _ModelDecoder(config, decoder, watch)


def _map_pages(tensors: Sequence[Tensor]) -> None:
    """Have the kernel map all pages of files at once, if they fit into memory; where it cannot, nothing is lost.

    Otherwise the first tokens pay for it row by row: a prefetch of a page that is not mapped does nothing.
    """
    available = available_memory()
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if available is None or advise is None or sum(tensor.nbytes for tensor in tensors) > available:
        return
    for tensor in tensors:
        first = tensor.data_ptr() // _PAGE * _PAGE
        size = tensor.data_ptr() + tensor.nbytes - first
        advise(ctypes.c_void_p(first), ctypes.c_size_t(size), ctypes.c_int(_POPULATE_READ))


def _is_plain(model: nn.Module, config: ModelConfig) -> bool:
    """Whether every module is of a class that the C++ library knows, with its own forward."""
    expected = dict(_CLASSES)
    for index in range(config.num_layers):
        expected |= {f"blocks.{index}.{name}".rstrip("."): names for name, names in _BLOCK_CLASSES.items()}
        expected[f"blocks.{index}.activation"] = {_ACTIVATION_CLASSES[config.ffn_activation]}
        if config.qk_norm:
            expected |= {f"blocks.{index}.attention.{name}": {"HeadNorm"} for name in _HEAD_NORMS}
    found = dict(model.named_modules())
    return found.keys() == expected.keys() and all(
        type(module).__name__ in expected[name] and "forward" not in vars(module)
        for name, module in found.items()
    )


def _describe(model: Any, config: ModelConfig) -> ModelTensors:
    return ModelTensors(
        embedding=model.embedding.weight,
        blocks=list(_describe_blocks(model)),
        final_norm=_norm(model.final_norm),
        head=model.head.weight,
        head_scales=getattr(model.head, "scales", None),
        num_heads=config.num_heads,
        rotary_size=config.rotary_size,
        bits=config.bits,
        inner_bits=config.inner_bits,
        temperature=config.temperature,
        score=config.score,
        activation=config.ffn_activation,
        norm_epsilon=config.norm_epsilon,
        softcap=config.logit_softcap,
    )


def _describe_blocks(model: Any) -> Iterator[BlockTensors]:
    for block in model.blocks:
        norms: Any = {name: _norm(getattr(block, name)) for name in _NORMS}
        lookups: Any = {name: _lookup(getattr(block, name)) for name in _LOOKUPS}
        gains = [getattr(getattr(block.attention, name), "weight", None) for name in _HEAD_NORMS]
        yield BlockTensors(**norms, **lookups, query_gain=gains[0], key_gain=gains[1])


def _norm(norm: Any) -> NormTensors:
    return NormTensors(norm.weight, norm.bias)


def _lookup(lookup: Any) -> LookupTensors:
    return LookupTensors(lookup.tables, getattr(lookup, "scales", None), lookup.bias)
