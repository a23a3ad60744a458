"""The C++ steps of norms and of the cross-entropy against the torch ones in float64; splits, threads and runs."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mf_train.kernels import cpu, cpu_loss, cpu_norm, fast_loss, fast_norm
from mf_train.model import loss_steps, norm_steps
from mf_train.model.sums import num_chunks
from tests.closeness import TOLERANCE, assert_close
from tests.kernels import norm_checks
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


CENTRED = pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])


@LEADS
@SIZES
@DTYPES
@CENTRED
def test_norm_steps(centred: bool, dtype: torch.dtype, size: int, lead: tuple[int, ...]) -> None:
    given = norm_checks.random_arguments(size, size, lead, dtype, centred)
    actual = on_one_and_two_threads(lambda: tuple(norm_checks.run(cpu_norm, given)))
    norm_checks.check_against_float64(list(actual), given)
    # from these statistics the same operations on each element as torch's, so the same bits
    chunk = size // num_chunks(size)
    sums = cpu_norm.moments(given.x, chunk, centred=centred).unsqueeze(0)
    y, mean, rstd = norm_steps.normalise(given.x, sums, given.weight, given.bias, chunk, norm_checks.EPSILON)
    for value, expected in zip(actual, (y, mean, rstd), strict=False):
        assert torch.equal(value, expected)


@DTYPES
@CENTRED
@pytest.mark.parametrize("size", [5, 12, 64, 192, 1024])
@pytest.mark.parametrize("steps", [cpu_norm, norm_steps], ids=["C++", "torch"])
def test_norms_have_the_same_bits_on_any_number_of_ranks(
    steps: ModuleType, size: int, centred: bool, dtype: torch.dtype
) -> None:
    given = norm_checks.random_arguments(size, size, (133,), dtype, centred)
    whole = norm_checks.run(steps, given)
    for ranks in (1, 2, 4, 8):
        if num_chunks(size) % ranks == 0:
            norm_checks.check_ranks(steps, given, ranks, whole)


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
    d_logits = cpu_loss.gradient(logits, normaliser, factor, target, softcap=120.0)
    expected *= 1 - (logits.double() / 120).square()
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
        given = norm_checks.Arguments(
            x, torch.ones_like(x), torch.ones(40).to(dtype), torch.zeros(40).to(dtype)
        )
        for found, expected in zip(
            norm_checks.run(cpu_norm, given), norm_checks.run(norm_steps, given), strict=True
        ):
            assert torch.equal(found.isfinite(), expected.isfinite())
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
