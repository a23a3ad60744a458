"""The C++ steps of norms and of the cross-entropy against the torch ones in float64; splits, threads and runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mf_train.kernels import cpu, cpu_loss, cpu_norm, fast_loss, fast_norm
from mf_train.model import loss_steps, norm_steps
from mf_train.model.sums import num_chunks, pairwise_moments, pairwise_sum
from tests.closeness import TOLERANCE, assert_close
from tests.threads import threads

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=cpu.reason())

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SIZES = pytest.mark.parametrize("size", [5, 8, 24, 40, 192, 1000])
LEADS = pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 70)], ids=str)


def on_one_and_two_threads(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    runs = []
    for number in (1, 2, 2):
        with threads(number):
            result = function()
        runs.append(result if isinstance(result, tuple) else (result,))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))
    return runs[0]


@LEADS
@SIZES
@DTYPES
@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
def test_norm_steps(centred: bool, dtype: torch.dtype, size: int, lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(*lead, size, generator=generator) * 3 + 5 * centred).to(dtype)
    dy = torch.randn(*lead, size, generator=generator).to(dtype)
    weight, bias = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    bias = bias if centred else None
    chunk = size // num_chunks(size)
    wide = [t if t is None else t.double() for t in (x, dy, weight, bias)]

    (sums,) = on_one_and_two_threads(lambda: cpu_norm.moments(x, chunk, centred=centred))
    exact_sums = norm_steps.moments(wide[0], chunk, centred=centred)
    assert sums.dtype == torch.float32
    assert_close(sums[..., 0], exact_sums[..., 0], 2e-6)
    assert_close(sums[..., 1], exact_sums[..., 1], 2e-6)

    mean, rstd = exact_sums[..., 0].float(), torch.rsqrt(exact_sums[..., 1] / size + 1e-3).float()
    statistics = mean.double(), rstd.double()
    (y,) = on_one_and_two_threads(lambda: cpu_norm.normalise(x, mean, rstd, weight, bias))
    assert y.dtype == dtype
    # the same operations on each element as torch's, so the same bits
    assert torch.equal(y, norm_steps.normalise(x, mean, rstd, weight, bias))
    assert_close(y, norm_steps.normalise(wide[0], *statistics, wide[2], wide[3]), TOLERANCE[dtype])

    (partial,) = on_one_and_two_threads(lambda: cpu_norm.gradient_sums(dy, x, mean, rstd, weight, chunk))
    exact = norm_steps.gradient_sums(wide[1], wide[0], *statistics, wide[2], chunk)
    assert_close(partial, exact, 2e-6)

    sums = exact.float() / size
    gradients = on_one_and_two_threads(
        lambda: cpu_norm.gradients(dy, x, mean, rstd, weight, sums, centred=centred)
    )
    exact_gradients = norm_steps.gradients(
        wide[1], wide[0], *statistics, wide[2], sums.double(), centred=centred
    )
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, expected, TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("size", [64, 192, 1024])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_norm_sums_do_not_depend_on_the_number_of_ranks(ranks: int, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(33, size, generator=torch.Generator().manual_seed(ranks)).to(dtype)
    dy = torch.randn(33, size, generator=torch.Generator().manual_seed(ranks + 1)).to(dtype)
    weight = torch.randn(size, generator=torch.Generator().manual_seed(ranks + 2)).to(dtype)
    mean, rstd = torch.rand(33), torch.rand(33)
    chunk, width = size // num_chunks(size), size // ranks
    for centred in (True, False):
        whole = cpu_norm.moments(x, chunk, centred=centred)
        parts = torch.stack(
            [cpu_norm.moments(part, chunk, centred=centred) for part in x.split(width, -1)], -1
        )
        joined = pairwise_moments(parts[:, 0], parts[:, 1], width)
        assert torch.equal(torch.stack(joined, -1), whole)
    parts = [
        cpu_norm.gradient_sums(*arguments[:2], mean, rstd, arguments[2], chunk)
        for arguments in zip(dy.split(width, -1), x.split(width, -1), weight.split(width), strict=True)
    ]
    whole = cpu_norm.gradient_sums(dy, x, mean, rstd, weight, chunk)
    assert torch.equal(pairwise_sum(torch.stack(parts, -1)), whole)


@LEADS
@SIZES
@DTYPES
def test_loss_steps(dtype: torch.dtype, size: int, lead: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(*lead, size, generator=generator) * 4 - 90).to(dtype)
    target = torch.randint(-1, size, lead, generator=generator)
    chunk = size // num_chunks(size)

    (sums,) = on_one_and_two_threads(lambda: cpu_loss.sums(logits, target, chunk))
    exact = loss_steps.sums(logits.double(), target, chunk)
    assert sums.dtype == torch.float32
    assert torch.equal(sums[..., ::2, :].double(), exact[..., ::2, :])  # largest logits, and those of targets
    assert_close(sums[..., 1, :], exact[..., 1, :], 2e-6)

    normaliser, factor = torch.logsumexp(logits.float(), -1), torch.randn(lead, generator=generator)
    (d_logits,) = on_one_and_two_threads(lambda: cpu_loss.gradient(logits, normaliser, factor, target))
    assert d_logits.dtype == dtype
    expected = loss_steps.gradient(logits.double(), normaliser.double(), factor.double(), target)
    assert_close(d_logits, expected, TOLERANCE[dtype])
    for steps in (cpu_loss, loss_steps):
        taken = logits.clone()
        result = steps.gradient(taken, normaliser, factor, target, overwrite=True)
        assert result is taken
        assert torch.equal(result, steps.gradient(logits, normaliser, factor, target))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_loss_sums_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    logits = torch.randn(17, 8 * 21, generator=torch.Generator().manual_seed(ranks))
    nobody = torch.full((17,), -1)
    parts = [cpu_loss.sums(part, nobody, 21) for part in logits.chunk(ranks, -1)]
    assert torch.equal(torch.cat(parts, -1), cpu_loss.sums(logits, nobody, 21))


@DTYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(value: float, dtype: torch.dtype) -> None:
    """A NaN or an infinity makes its own token's numbers NaN, as in torch, and no other token's."""
    for position in (0, 20, 39):
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
        x[1, position] = value
        sums = cpu_norm.moments(x, 5, centred=True)
        expected = norm_steps.moments(x, 5, centred=True)
        assert torch.equal(sums.isfinite(), expected.isfinite())
        most, totals, _ = cpu_loss.sums(x, torch.full((3,), -1), 5).unbind(-2)
        loss = most.amax(-1) + (totals * (most - most.amax(-1, keepdim=True)).exp()).sum(-1).log()
        expected = torch.logsumexp(x.double(), -1)
        assert torch.isfinite(loss).tolist() == [True, value == float("-inf"), True]
        if value == float("-inf"):
            assert_close(loss, expected, 1e-5)


def test_which_tensors_take_the_fast_steps() -> None:
    for fast, steps in ((fast_norm, cpu_norm), (fast_loss, cpu_loss)):
        assert fast(torch.zeros(2)) is steps
        assert fast(torch.zeros(2, dtype=torch.bfloat16)) is steps
        assert fast(torch.zeros(2, dtype=torch.float64)) is None
        assert fast(torch.zeros(2, dtype=torch.float16)) is None
        assert fast(torch.zeros(2, device="meta")) is None
