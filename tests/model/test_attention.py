"""Rotary embedding, masks, the key-value cache, padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model.attention.base import Context
from mf_train.model.attention.masks import causal_mask
from mf_train.model.attention.rotary import rotary_table, rotate
from mf_train.model.attention.softmax import SoftmaxAttention
from tests.model.reference import attention as reference_attention
from tests.model.test_model import random_tokens
from tests.models import random_model


class ListCache:
    """The smallest cache that fits `KeyValueCache`: a list of a layer's keys and values."""

    def __init__(self) -> None:
        self.layers: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.layers.setdefault(layer, []).append((key, value))
        keys, values = zip(*self.layers[layer], strict=True)
        return torch.cat(keys, dim=-2), torch.cat(values, dim=-2)

    def get_seq_length(self) -> int:
        return sum(key.shape[-2] for key, _ in self.layers.get(0, []))


@pytest.mark.parametrize("size", [0, 2, 6, 16])
def test_rotation_is_complex_multiplication(size: int) -> None:
    """Pairs (i, i + size / 2) turn by position * base^(-2i / size); the rest of the head stays."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 3, 40, 16, generator=generator, dtype=torch.float64)
    y = rotate(x, rotary_table(torch.arange(40), size, 10000.0))
    half = size // 2
    angles = torch.outer(
        torch.arange(40.0, dtype=torch.float64), 10000.0 ** (-2 * torch.arange(half).double() / max(size, 1))
    )
    turned = torch.complex(x[..., :half], x[..., half:size]) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag, x[..., size:]), dim=-1)
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-5)  # angles up to 40 in float32
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=generator, dtype=torch.float64)

    def score(query_at: int, key_at: int) -> Tensor:
        return (
            rotate(q, rotary_table(torch.tensor([query_at]), 8, 100.0))
            * rotate(k, rotary_table(torch.tensor([key_at]), 8, 100.0))
        ).sum()

    torch.testing.assert_close(score(9, 4), score(105, 100), rtol=1e-4, atol=1e-5)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-2


@pytest.mark.parametrize("rotary_fraction", [0.0, 0.25, 1.0])
def test_attention_against_the_definition(rotary_fraction: float) -> None:
    config = ModelConfig(hidden_size=48, num_heads=3, bits=4, rotary_fraction=rotary_fraction)
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 2, 11, 48, generator=generator, dtype=torch.float64)
    rotary = rotary_table(torch.arange(11), config.rotary_size, config.rotary_base)
    y = SoftmaxAttention(config)(q, k, v, Context(rotary))
    expected = torch.stack([reference_attention(q[b], k[b], v[b], config) for b in range(2)])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    # a rank that holds the last two heads gets their columns
    part = SoftmaxAttention(config)(q[..., 16:], k[..., 16:], v[..., 16:], Context(rotary))
    torch.testing.assert_close(part, y[..., 16:], rtol=1e-12, atol=1e-12)


def test_masks() -> None:
    cpu = torch.device("cpu")
    none = torch.ones(2, 5, dtype=torch.long)
    assert causal_mask(5, 0, None, cpu) is None and causal_mask(5, 0, none, cpu) is None
    assert causal_mask(1, 4, none, cpu) is None
    mask = causal_mask(2, 3, None, cpu)
    assert mask is not None and mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    mask = causal_mask(3, 0, torch.tensor([[0, 1, 1], [1, 1, 1]]), cpu)
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    mask = causal_mask(3, 0, torch.tensor([[1, 1, 0]]), cpu)
    assert mask is not None and mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 0]]
    mask = causal_mask(1, 2, torch.tensor([[0, 1, 1]]), cpu)
    assert mask is not None and mask[0, 0].int().tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [4, 3, 5], [12]])
@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_cached_decoding_equals_one_pass(kind: str, pieces: list[int]) -> None:
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=3, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 3)
    tokens, _ = random_tokens(config, 4, 2, 12)
    cache = ListCache()
    parts = [model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)]
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_rows_alone(side: str, kind: str) -> None:
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 5)
    tokens, _ = random_tokens(config, 6, 3, 10)
    lengths = [10, 7, 1]
    mask = torch.zeros(3, 10, dtype=torch.long)
    places = [slice(10 - n, 10) if side == "left" else slice(0, n) for n in lengths]
    for row, place in enumerate(places):
        mask[row, place] = 1
    logits = model(tokens, attention_mask=mask)
    assert logits.isfinite().all()  # at padding too
    for row, place in enumerate(places):
        alone = model(tokens[row : row + 1, place])
        torch.testing.assert_close(logits[row, place], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_cached_decoding_of_left_padded_rows(kind: str) -> None:
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 7)
    tokens, _ = random_tokens(config, 8, 2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    cache, parts, end = ListCache(), [], 0
    for piece in (6, 1, 1, 2):
        end += piece
        parts.append(model(tokens[:, end - piece : end], attention_mask=mask[:, :end], cache=cache))
    logits = torch.cat(parts, dim=1)
    torch.testing.assert_close(logits[0], model(tokens[:1])[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logits[1, 4:], model(tokens[1:, 4:])[0], rtol=1e-9, atol=1e-9)
