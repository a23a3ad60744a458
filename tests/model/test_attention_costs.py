"""Counts of every kind of attention against what torch counts and what the backward pass keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mf_train.config import ModelConfig
from mf_train.model.attention.base import Attention, Context
from mf_train.model.attention.costs import COSTS, attention_costs
from mf_train.model.attention.kinds import KINDS, build_attention
from mf_train.model.attention.rotary import rotary_table
from mf_train.model.counts import count_block_flops

CONFIG = ModelConfig(
    hidden_size=128,
    num_layers=2,
    num_heads=4,
    attention_window=48,
    attention_features=80,
    attention_segment=64,
    attention_rank=8,
    attention_slots=6,
    attention_filter=3,
    attention_bits=12,
    attention_anchors=10,
    sequence_length=512,
)
LENGTHS = [32, 300, 512]


def test_every_kind_has_costs() -> None:
    assert COSTS.keys() == KINDS.keys()


def attention_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Attention:
    attention = build_attention(config, 0).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    return attention


def attend(attention: Attention, inputs: list[Tensor]) -> Tensor:
    heads = [x.unflatten(-1, (CONFIG.num_heads, -1)).transpose(1, 2) for x in inputs]
    return attention.attend_within(*heads, Context(rotary_table(torch.arange(1), 0, 1.0)))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", COSTS)
def test_products_are_those_that_torch_counts(kind: str, length: int) -> None:
    """torch counts 2 for a multiply-add, and attention's whole square."""
    config = replace(CONFIG, attention=kind)  # type: ignore[arg-type]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        attend(attention_of(config), [torch.randn(1, length, 128) for _ in range(3)])
    counted = attention_costs(config, length)[0].multiply_adds * length
    assert counter.get_total_flops() / 2 == pytest.approx(counted)
    assert count_block_flops(config, length).attention == pytest.approx(counted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", COSTS)
def test_what_the_backward_pass_keeps(kind: str, length: int, dtype: torch.dtype) -> None:
    """Storages that are neither weights, q, k, v nor the result, within a tenth of attention's bytes, or a fifth.

    Luna and EcoFormer make float32 copies of k and v, which are no copies where these are that.
    """
    config = replace(CONFIG, attention=kind)  # type: ignore[arg-type]
    inputs = [torch.randn(1, length, 128).to(dtype).requires_grad_() for _ in range(3)]
    attention, found = attention_of(config, dtype), dict[int, int]()

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = attend(attention, inputs)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*attention.parameters(), *inputs, y)}
    kept = sum(size for place, size in found.items() if place not in own) / length
    cost = attention_costs(config, length)[0]
    counted = cost.kept_numbers * dtype.itemsize + 4 * cost.kept_sums
    share = 0.2 if kind in ("luna", "ecoformer") else 0.1
    assert abs(kept - counted) < share * (counted + 4 * 128 * dtype.itemsize), (kept, counted)


def test_a_block_with_full_attention_counts_its_own() -> None:
    pure = [count_block_flops(replace(CONFIG, attention=kind)).attention for kind in ("softmax", "window")]  # type: ignore[arg-type]
    mixed = count_block_flops(replace(CONFIG, attention="window", full_attention_layers=(1,)))
    assert mixed.attention == sum(pure) / 2
    assert pure[0] == 2 * 512 * 512 * 128
