"""The binding of the C++ decoder: what it refuses. What it computes is tested in tests/standalone/test_decoding.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mf_train.kernels import cpu
from mf_train.kernels.decode import (
    MAX_BATCH,
    BlockTensors,
    Decoder,
    LookupTensors,
    ModelTensors,
    NormTensors,
)

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"no C++ operation: {cpu.reason()}")

D, K, TAU, INNER_TAU, HEADS, V = 12, 4, 3, 4, 2, 7
INNER = K * INNER_TAU


def norm(features: int) -> NormTensors:
    return NormTensors(torch.ones(features), torch.zeros(features))


def lookup(bits: int, columns: int) -> LookupTensors:
    return LookupTensors(torch.randn(K, 2**bits, columns), None, torch.zeros(columns))


def block() -> BlockTensors:
    return BlockTensors(
        *(norm(D), norm(D), norm(INNER)),
        *(lookup(TAU, D) for _ in range(3)),
        *(lookup(TAU, INNER), lookup(INNER_TAU, D)),
    )


def model(**changes: Any) -> ModelTensors:
    tensors = ModelTensors(
        embedding=torch.randn(V, D),
        blocks=[block(), block()],
        final_norm=norm(D),
        head=torch.randn(V, D),
        head_scales=None,
        num_heads=HEADS,
        rotary_size=4,
        bits=TAU,
        inner_bits=INNER_TAU,
        temperature=1.0,
        score="probability",
        activation="none",
        norm_epsilon=1e-5,
    )
    return replace(tensors, **changes)


def with_block(**changes: Any) -> ModelTensors:
    return model(blocks=[block(), replace(block(), **changes)])


def int8(columns: int, scales: Tensor) -> LookupTensors:
    return LookupTensors(torch.zeros(K, 2**TAU, columns, dtype=torch.int8), scales, torch.zeros(columns))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: model(head=torch.randn(V, D + 1)), r"head must be torch.float32 \(7, 12\).*got.*\(7, 13\)"),
        (lambda: model(head=torch.randn(D, V).t()), r"head must be .*contiguous.*strides \(1, 7\)"),
        (lambda: model(head=torch.randn(V, D).bfloat16()), "head must be torch.float32.*got torch.bfloat16"),
        (lambda: model(head_scales=torch.ones(V)), "head must be torch.int8"),
        (lambda: model(final_norm=norm(D - 1)), r"final_norm.weight must be torch.float32 \(12,\)"),
        (lambda: model(embedding=torch.randn(V, D, device="meta")), "embedding must be .*on meta"),
        (lambda: with_block(up=lookup(TAU, D)), r"blocks.1.up.bias must be torch.float32 \(16,\)"),
        (
            lambda: with_block(down=lookup(TAU, D)),
            r"blocks.1.down.tables must be torch.float32 \(4, 16, 12\)",
        ),
        (lambda: with_block(norm_inner=norm(D)), r"blocks.1.norm_inner.weight must be torch.float32 \(16,\)"),
        (
            lambda: with_block(key=int8(D, torch.ones(K, 8))),
            "blocks.1: query, key and value must all be int8",
        ),
        (lambda: with_block(up=int8(INNER, torch.ones(K, 7))), r"up.tables' scales must be .*\(4, 8\)"),
    ],
)
def test_a_wrong_tensor_is_named(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(wrong())


def step_arguments(**changes: Any) -> dict[str, Any]:
    caches = [torch.zeros(2, HEADS, 5, D // HEADS) for _ in range(4)]
    arguments = {
        "token_ids": torch.tensor([1, 6]),
        "past": 3,
        "cosine": torch.ones(2),
        "sine": torch.zeros(2),
        "keys": caches[:2],
        "values": caches[2:],
    }
    return arguments | changes


def test_a_step() -> None:
    arguments = step_arguments()
    logits = Decoder(model()).step(**arguments)
    assert logits.shape == (2, V) and bool(torch.isfinite(logits).all())
    for cache in (*arguments["keys"], *arguments["values"]):
        assert cache[:, :, 3].count_nonzero() == cache[:, :, 3].numel()
        assert not cache[:, :, :3].any() and not cache[:, :, 4:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": torch.tensor([1, 2], dtype=torch.int32)}, "token_ids must be torch.int64"),
        ({"token_ids": torch.zeros(MAX_BATCH + 1, dtype=torch.int64)}, r"B from 1 to 16, got \(17,\)"),
        ({"token_ids": torch.tensor([1])}, r"keys must be torch.float32 \(1, 2, 5, 6\)"),
        ({"past": 5}, "past must be from 0 to below the capacity 5, got 5"),
        ({"past": -1}, "past must be from 0"),
        ({"cosine": torch.ones(3)}, r"cosine must be torch.float32 \(2,\)"),
        ({"sine": torch.ones(2, dtype=torch.float64)}, "sine must be torch.float32"),
        ({"keys": []}, "keys and values of 2 layers, got 0, 2"),
        (
            {"values": [torch.zeros(2, HEADS, 4, D // HEADS)] * 2},
            r"values must be torch.float32 \(2, 2, 5, 6\)",
        ),
        ({"keys": [torch.zeros(2, 5, HEADS, D // HEADS).transpose(1, 2)] * 2}, "keys must be .*contiguous"),
    ],
)
def test_a_wrong_argument_of_a_step_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoder(model()).step(**step_arguments(**changes))


@pytest.mark.parametrize("token", [V, -1])
def test_a_token_outside_the_vocabulary_writes_nothing(token: int) -> None:
    arguments = step_arguments(token_ids=torch.tensor([0, token]))
    with pytest.raises(IndexError, match=rf"token ids \[0, {token}\] must be from 0 to 6"):
        Decoder(model()).step(**arguments)
    assert not any(cache.any() for cache in (*arguments["keys"], *arguments["values"]))
