"""One token of every sequence through a whole model in one call of the C++ library (csrc/decode.cpp): for decoding.

A description names the model's tensors; a `Decoder` checks them once, keeps them alive and computes with them where
they are. It knows nothing of modules and caches: `mf_train.standalone.decoding` makes the description from a model.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cpu
from .buffers import address

MAX_BATCH = 16
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2}


@dataclass(frozen=True)
class NormTensors:
    """weight [features]; bias [features], or None for RMSNorm."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class LookupTensors:
    """tables [K, 2**tau, O] of the model's dtype, or int8 with float32 scales [K, 2**tau]; bias [O]."""

    tables: Tensor
    scales: Tensor | None
    bias: Tensor


@dataclass(frozen=True)
class BlockTensors:
    norm_attention: NormTensors
    norm_ffn: NormTensors
    norm_inner: NormTensors
    query: LookupTensors
    key: LookupTensors
    value: LookupTensors
    up: LookupTensors
    down: LookupTensors
    # gains [D] of the norms of each head's queries and keys (`model.qk_norm`); both or none
    query_gain: Tensor | None = None
    key_gain: Tensor | None = None


@dataclass(frozen=True)
class ModelTensors:
    """A MemoryFormer (Eq. 13). embedding [V, D]; head [V, D], or int8 with float32 head_scales [V]."""

    embedding: Tensor
    blocks: Sequence[BlockTensors]
    final_norm: NormTensors
    head: Tensor
    head_scales: Tensor | None
    num_heads: int
    rotary_size: int  # features of each head that are rotated
    bits: int
    inner_bits: int
    temperature: float
    score: str
    activation: str
    norm_epsilon: float
    softcap: float = 0.0  # of the logits; 0: none


class _Norm(Structure):
    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class _Lookup(Structure):
    _fields_ = [("tables", c_void_p), ("scales", c_void_p), ("bias", c_void_p)]


class _Block(Structure):
    _fields_ = [
        *((name, _Norm) for name in ("norm_attention", "norm_ffn", "norm_inner")),
        *((name, _Lookup) for name in ("query", "key", "value", "up", "down")),
        *((name, c_void_p) for name in ("query_gain", "key_gain")),
    ]


_SIZES = ("type", "layers", "features", "heads", "tables", "bits", "inner_bits", "rotary", "vocabulary")


class _Model(Structure):
    _fields_ = [
        ("embedding", c_void_p),
        ("blocks", POINTER(_Block)),
        ("final_norm", _Norm),
        ("head", c_void_p),
        ("head_scales", c_void_p),
        *((name, c_int64) for name in (*_SIZES, "scaled", "activation")),
        ("epsilon", c_double),
        ("rate", c_double),
        ("softcap", c_double),
    ]


class _Step(Structure):
    _fields_ = [
        ("tokens", c_void_p),
        ("batch", c_int64),
        ("past", c_int64),
        *((name, c_void_p) for name in ("cosine", "sine", "keys", "values", "capacities", "logits")),
        ("threads", c_int64),
    ]


class Decoder:
    """A model's tensors, checked. They may change in place, but must not be freed or resized: the decoder holds them.

    Several threads may take steps at a time, each with a cache of its own.

    Raises ValueError where a tensor has another dtype, shape, device or layout than the description says, and
    RuntimeError where the C++ library is not available (`mf_train.kernels.cpu.reason`).
    """

    def __init__(self, model: ModelTensors) -> None:
        self._decode = cpu.function("mf_decode")
        self._tensors = model
        self.dtype = model.embedding.dtype
        self.vocab_size, self.features = model.embedding.shape
        self.head_size = self.features // model.num_heads
        self.num_heads = model.num_heads
        self._half_rotary = model.rotary_size // 2
        self._blocks = (_Block * len(model.blocks))()
        self._model = self._describe(model)

    def step(
        self,
        token_ids: Tensor,
        past: int,
        cosine: Tensor,
        sine: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> Tensor:
        """Logits [B, V] after one more token of each sequence; its keys and values are written at position `past`.

        Args:
            token_ids: [B] int64 on the CPU, contiguous, B from 1 to MAX_BATCH.
            past: positions that the caches hold so far.
            cosine, sine: float32 [rotary_size / 2] of position `past`.
            keys, values: of each layer, [B, H, capacity, head] contiguous, of the model's dtype, capacity > past.

        Raises:
            ValueError: arguments that do not fit.
            IndexError: a token that is not in the vocabulary.
            MemoryError: there was no scratch memory.
        """
        batch = token_ids.shape[0]
        if not 1 <= batch <= MAX_BATCH:
            raise ValueError(f"token_ids must be [B], B from 1 to {MAX_BATCH}, got {tuple(token_ids.shape)}")
        room = self._capacities(keys, values, past)
        arrays = [self._addresses("keys", keys, batch, room), self._addresses("values", values, batch, room)]
        capacities = (c_int64 * len(room))(*room)
        logits = torch.empty((batch, self.vocab_size), dtype=self.dtype, device="cpu")
        step = _Step(
            address("token_ids", token_ids, torch.int64, (batch,)),
            batch,
            past,
            address("cosine", cosine, torch.float32, (self._half_rotary,)),
            address("sine", sine, torch.float32, (self._half_rotary,)),
            *map(ctypes.addressof, (*arrays, capacities)),
            logits.data_ptr(),
            torch.get_num_threads(),
        )
        status = self._decode(ctypes.byref(self._model), ctypes.byref(step))
        if status == cpu.OUT_OF_RANGE:
            raise IndexError(f"token ids {token_ids.tolist()} must be from 0 to {self.vocab_size - 1}")
        if status:
            raise MemoryError(f"no scratch memory for a step of {batch} sequences")
        return logits

    def _capacities(self, keys: Sequence[Tensor], values: Sequence[Tensor], past: int) -> list[int]:
        """Positions that the caches of each layer have room for."""
        if not len(keys) == len(values) == len(self._blocks):
            raise ValueError(
                f"there must be keys and values of {len(self._blocks)} layers, got {len(keys)}, {len(values)}"
            )
        capacities = [key.shape[2] for key in keys]
        if not 0 <= past < min(capacities):
            raise ValueError(f"past must be from 0 to below the capacity {min(capacities)}, got {past}")
        return capacities

    def _addresses(self, name: str, tensors: Sequence[Tensor], batch: int, room: list[int]) -> Any:
        """An array of where the caches of each layer are."""
        pairs = zip(tensors, room, strict=True)
        shape = batch, self.num_heads
        found = [address(name, t, self.dtype, (*shape, size, self.head_size)) for t, size in pairs]
        return (c_void_p * len(found))(*found)

    def _describe(self, model: ModelTensors) -> _Model:
        tables = self.features // model.bits
        inner = tables * model.inner_bits
        for index, (block, tensors) in enumerate(zip(self._blocks, model.blocks, strict=True)):
            name = f"blocks.{index}"
            block.norm_attention = self._norm(f"{name}.norm_attention", tensors.norm_attention, self.features)
            block.norm_ffn = self._norm(f"{name}.norm_ffn", tensors.norm_ffn, self.features)
            block.norm_inner = self._norm(f"{name}.norm_inner", tensors.norm_inner, inner)
            for part, bits, columns in (
                *((part, model.bits, self.features) for part in ("query", "key", "value")),
                ("up", model.bits, inner),
                ("down", model.inner_bits, self.features),
            ):
                lookup = self._lookup(f"{name}.{part}", getattr(tensors, part), (tables, 2**bits, columns))
                setattr(block, part, lookup)
            if tensors.query_gain is not None and tensors.key_gain is not None:
                gain = partial(address, dtype=self.dtype, shape=(self.features,))
                block.query_gain = gain(f"{name}.query_gain", tensors.query_gain)
                block.key_gain = gain(f"{name}.key_gain", tensors.key_gain)
            scaled = {getattr(tensors, part).scales is not None for part in ("query", "key", "value")}
            if len(scaled) > 1:
                raise ValueError(f"{name}: query, key and value must all be int8, or none of them")
        head = self._matrix("head", model.head, model.head_scales, (self.vocab_size, self.features))
        return _Model(
            address("embedding", model.embedding, self.dtype, (self.vocab_size, self.features)),
            self._blocks,
            self._norm("final_norm", model.final_norm, self.features),
            *head,
            DTYPES[self.dtype],
            len(self._blocks),
            self.features,
            self.num_heads,
            tables,
            model.bits,
            model.inner_bits,
            model.rotary_size,
            self.vocab_size,
            model.score == "scaled_probability",
            ACTIVATIONS[model.activation],
            model.norm_epsilon,
            -2 / model.temperature,
            model.softcap,
        )

    def _norm(self, name: str, norm: NormTensors, features: int) -> _Norm:
        weight = address(f"{name}.weight", norm.weight, self.dtype, (features,))
        return _Norm(
            weight, None if norm.bias is None else address(f"{name}.bias", norm.bias, self.dtype, (features,))
        )

    def _lookup(self, name: str, lookup: LookupTensors, shape: tuple[int, ...]) -> _Lookup:
        bias = address(f"{name}.bias", lookup.bias, self.dtype, shape[-1:])
        return _Lookup(*self._matrix(f"{name}.tables", lookup.tables, lookup.scales, shape), bias)

    def _matrix(
        self, name: str, values: Tensor, scales: Tensor | None, shape: tuple[int, ...]
    ) -> tuple[int, int | None]:
        """Where rows of the model's dtype, or int8 rows and their scales, are."""
        rows = address(name, values, self.dtype if scales is None else torch.int8, shape)
        return rows, None if scales is None else address(f"{name}' scales", scales, torch.float32, shape[:-1])
