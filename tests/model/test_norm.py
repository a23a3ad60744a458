"""The norm and its fixed order of sums, against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.config.model import NormKind
from mf_train.model.norm import Norm
from mf_train.model.sums import chunk_moments, chunk_sums, num_chunks, pairwise_moments, pairwise_sum


def make_norm(features: int, kind: NormKind, seed: int = 0, dtype: torch.dtype = torch.float64) -> Norm:
    generator = torch.Generator().manual_seed(seed)
    norm = Norm(features, kind, 1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=generator)
    return norm.to(dtype)


def torch_norm(x: Tensor, norm: Norm) -> Tensor:
    """The same in float64 by torch, from the same numbers."""
    weight = norm.weight.double()
    if norm.bias is None:
        return F.rms_norm(x.double(), (norm.features,), weight, norm.epsilon)
    return F.layer_norm(x.double(), (norm.features,), weight, norm.bias.double(), norm.epsilon)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("features", [1, 2, 3, 7, 8, 12, 20, 24, 512])
def test_output_and_gradients_equal_torch_s(features: int, kind: NormKind) -> None:
    generator = torch.Generator().manual_seed(features)
    norm = make_norm(features, kind)
    x = torch.randn(3, 5, features, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    y, expected = norm(x), torch_norm(x, norm)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    leaves = [x, *norm.parameters()]
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("features", [3, 8, 12])
def test_gradcheck(features: int, kind: NormKind) -> None:
    norm = make_norm(features, kind)
    x = torch.randn(2, 3, features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    names = [name for name, _ in norm.named_parameters()]
    leaves = [p.detach().requires_grad_() for p in norm.parameters()]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *leaves))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("mean", [0.0, 1e2, -1e4])
def test_float32_with_a_large_mean(mean: float, kind: NormKind) -> None:
    """Nothing cancels but the mean's own rounding: a few units of 2^-24, of the mean, where a naive
    E[x^2] - E[x]^2 would have lost the variance of 1 at a mean of 1e4.
    """
    norm = make_norm(512, kind, dtype=torch.float32)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(4)) + mean
    error = (norm(x) - torch_norm(x, norm)).abs().max()
    assert error < 4 * 2**-24 * (abs(mean) + 8) * norm.weight.abs().max()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e18, 1e-30])
def test_constant_features_stay_finite(value: float, kind: NormKind) -> None:
    norm = make_norm(16, kind, dtype=torch.float32)
    x = torch.full((2, 16), value, requires_grad=True)
    y = norm(x)
    assert y.isfinite().all()
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_bfloat16_is_the_float32_result_rounded_once(kind: NormKind) -> None:
    norm = make_norm(64, kind, dtype=torch.bfloat16)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    wide = make_norm(64, kind, dtype=torch.bfloat16).float()(x.float())
    assert torch.equal(y, wide.bfloat16())


@pytest.mark.parametrize(("size", "chunks"), [(1, 1), (3, 1), (6, 2), (12, 4), (24, 8), (768, 8), (50304, 8)])
def test_number_of_chunks(size: int, chunks: int) -> None:
    assert num_chunks(size) == chunks and size % chunks == 0


def test_sums_have_the_same_bits_for_every_split() -> None:
    """The tree over 8 chunks, cut after any level and joined again, as ranks do it."""
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(6)).exp()
    chunk = 96 // 8
    total = chunk_sums(x, chunk)
    mean, squares = chunk_moments(x, chunk, centred=True)
    torch.testing.assert_close(total, x.sum(-1))
    torch.testing.assert_close(mean, x.mean(-1))
    torch.testing.assert_close(squares / 96, x.var(-1, correction=0))
    for ranks in (2, 4, 8):
        shards = x.chunk(ranks, dim=-1)
        assert torch.equal(pairwise_sum(torch.stack([chunk_sums(s, chunk) for s in shards], -1)), total)
        moments = [chunk_moments(s, chunk, centred=True) for s in shards]
        means, deviations = (torch.stack(parts, -1) for parts in zip(*moments, strict=True))
        joined = pairwise_moments(means, deviations, 96 // ranks)
        assert torch.equal(joined[0], mean) and torch.equal(joined[1], squares)
