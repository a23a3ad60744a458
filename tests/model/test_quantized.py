"""Int8 rows, lookup and head against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model import MemoryFormer
from mf_train.model.head import Head
from mf_train.model.memory import Lookup
from mf_train.model.quantized import Int8Head, Int8Lookup, quantize_rows, row_scales, scales_name, use_int8
from tests.examples import examples
from tests.model.reference import logits_of
from tests.model.test_model import PRODUCT

CONFIG = ModelConfig(
    hidden_size=24, num_layers=2, num_heads=2, bits=3, expand_bits=1, vocab_size=52, sequence_length=16
)


def dequantized(values: Tensor, scales: Tensor) -> Tensor:
    return values.double() * scales.double().unsqueeze(-1)


@examples(100)
@given(
    st.lists(st.integers(0, 5), min_size=0, max_size=2),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**20),
)
def test_every_value_is_within_half_a_step(
    rows: list[int], columns: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 2.0 ** torch.randint(-90, 120, (*rows, 1), generator=generator)
    values = (torch.randn(*rows, columns, generator=generator) * size).to(dtype)
    stored, scales = quantize_rows(values)
    assert stored.dtype == torch.int8 and scales.dtype == torch.float32
    assert stored.shape == values.shape and scales.shape == values.shape[:-1]
    assert torch.equal(scales, row_scales(values))
    largest = values.double().abs().amax(-1)
    torch.testing.assert_close(scales.double(), largest / 127, rtol=2**-24, atol=0)
    error = (values.double() - dequantized(stored, scales)).abs()
    assert (error <= scales.double().unsqueeze(-1) * (0.5 + 2**-16)).all()
    assert (stored.abs().amax(-1) == 127).all()  # the whole range is used
    assert torch.equal(quantize_rows(-values)[0], -stored)


def test_halves_go_to_even_and_special_rows() -> None:
    values = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6, [-0.0] * 6, [1e-43, 0, 0, 0, 0, 0]])
    stored, scales = quantize_rows(values)
    assert stored[0].tolist() == [127, 0, 2, 2, 0, -2]
    assert scales[:3].tolist() == [1.0, 0.0, 0.0] and stored[1:3].abs().sum() == 0
    assert 0 <= dequantized(stored, scales)[3, 0] <= 2e-43  # a subnormal scale, and no overflow
    bad = torch.tensor([[1.0, torch.nan], [torch.inf, 1.0], [-torch.inf, torch.nan]])
    assert not row_scales(bad).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tables", "bits", "features"), [(1, 1, 1), (5, 4, 33), (64, 8, 96), (3, 10, 7)])
def test_lookup(tables: int, bits: int, features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tables)
    plain = Lookup(tables, bits, features)
    with torch.no_grad():
        plain.tables.normal_(generator=generator)
        plain.bias.normal_(generator=generator)
    module = Int8Lookup(plain)
    module.bias.data = module.bias.to(dtype)
    codes = torch.randint(2**bits, (2, 7, tables), generator=generator)
    codes[0, 0], codes[0, 1] = 0, 2**bits - 1
    codes = codes.to(torch.uint8 if bits <= 8 else torch.int16)
    weights = torch.rand(2, 7, tables, generator=generator).to(dtype)
    y = module(codes, weights)
    assert y.dtype == dtype and not y.isnan().any()
    rows = dequantized(module.tables, module.scales)[torch.arange(tables), codes.long()]
    products = weights.double().unsqueeze(-1) * rows
    expected = products.sum(-2) + module.bias.double()
    error = torch.finfo(dtype).eps * (products.sum(-2).abs() + expected.abs()) + 1e-6 * products.abs().sum(-2)
    assert ((y.double() - expected).abs() <= error).all()
    # and the tables are the plain module's, to half a step
    exact = (weights.double().unsqueeze(-1) * plain.tables.double()[torch.arange(tables), codes.long()]).sum(
        -2
    )
    step = (weights.double() * module.scales.double()[torch.arange(tables), codes.long()]).sum(
        -1, keepdim=True
    )
    assert ((products.sum(-2) - exact).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [7, 52, 4096])
def test_head(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    plain = Head(40, vocab_size)
    with torch.no_grad():
        plain.weight.normal_(generator=generator)
    head = Int8Head(plain)
    assert not list(head.parameters())
    x = torch.randn(2, 5, 40, generator=generator).to(dtype)
    logits = head(x)
    rows = dequantized(head.weight, head.scales)
    expected = torch.einsum("bsd,vd->bsv", x.double(), rows)
    size = torch.einsum("bsd,vd->bsv", x.double().abs(), rows.abs())
    assert logits.dtype == dtype
    assert ((logits.double() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() + 1e-6 * size).all()
    targets = torch.randint(vocab_size, (2, 5), generator=generator)
    targets[1, 2] = -100
    losses = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    torch.testing.assert_close(
        head.token_losses(logits, targets).double().flatten(), losses, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(ValueError, match=r"head.scales is torch.bfloat16: .* must stay float32"):
        head.bfloat16()(x.bfloat16())


@pytest.mark.parametrize(
    ("kind", "scaled"),
    [
        ({}, 11),
        ({"kind": "dense"}, 1),
        ({"ffn": "low_rank", "rank": 3}, 7),
        ({"ffn": "product_key"} | PRODUCT, 9),
    ],
    ids=["memoryformer", "dense", "hybrid", "product keys"],
)
def test_a_whole_model(kind: dict[str, Any], scaled: int) -> None:
    """Its logits are those of a float64 reference whose weights are what the int8 rows stand for."""
    config = ModelConfig(**{**vars(CONFIG), **kind})
    model = MemoryFormer(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert use_int8(model) is model
    after = model.state_dict()
    scales = {name: scales_name(name) for name in before}
    assert after.keys() == before.keys() | {name for name in scales.values() if name}
    weights = {}
    for name, value in before.items():
        if scales[name] is None:
            assert torch.equal(after[name], value)
            weights[name] = value.double()
        else:
            stored, steps = quantize_rows(value)
            assert torch.equal(after[name], stored) and torch.equal(after[scales[name]], steps)
            weights[name] = dequantized(stored, steps)
    assert sum(map(bool, scales.values())) == scaled
    tokens = torch.randint(52, (2, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = model(tokens)
    torch.testing.assert_close(logits.double(), logits_of(weights, config, tokens), rtol=1e-4, atol=1e-4)


def test_meta_stays_meta() -> None:
    with torch.device("meta"):
        model = use_int8(MemoryFormer(CONFIG).bfloat16())
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["blocks.1.down.tables"] == (8, 16, 24) and shapes["blocks.1.down.scales"] == (8, 16)
    assert shapes["head.weight"] == (52, 24) and shapes["head.scales"] == (52,)
    kinds = {
        (name.rpartition(".")[2] == "scales", str(tensor.dtype))
        for name, tensor in model.state_dict().items()
    }
    assert kinds == {(True, "torch.float32"), (False, "torch.int8"), (False, "torch.bfloat16")}
