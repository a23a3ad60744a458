"""What every implementation of a norm's four steps owes: what float64 gives, and the same bits on any number of ranks.

`steps` is mf_train/model/norm_steps.py, or a module of mf_train/kernels with its functions.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mf_train.model.sums import num_chunks
from tests.closeness import TOLERANCE, assert_close

EPSILON = 1e-3


class Arguments(NamedTuple):
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None  # None: RMSNorm

    def columns(self, rank: int, ranks: int) -> "Arguments":
        return Arguments(*(t if t is None else t.chunk(ranks, -1)[rank].contiguous() for t in self))


def random_arguments(
    seed: int, size: int, lead: tuple[int, ...], dtype: torch.dtype, centred: bool, device: str = "cpu"
) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, size, generator=generator) * 3 + 5 * centred
    dy = torch.randn(*lead, size, generator=generator)
    weight, bias = torch.randn(2, size, generator=generator)
    x, dy, weight, bias = (t.to(dtype).to(device) for t in (x, dy, weight, bias))
    return Arguments(x, dy, weight, bias if centred else None)


def run(steps: ModuleType, given: Arguments) -> list[Tensor]:
    """y, mean, rstd, dx, d weight and with a bias d bias, where all features are in one place."""
    x, dy, weight, bias = given
    chunk, centred = x.shape[-1] // num_chunks(x.shape[-1]), bias is not None
    y, mean, rstd = steps.normalise(x, None, weight, bias, chunk, EPSILON)
    dx, d_weight, d_bias = steps.gradients(dy, x, mean, rstd, weight, None, chunk, centred=centred)
    assert (d_bias is not None) == centred
    return [y, mean, rstd, dx, d_weight, *([d_bias] if centred else [])]


def run_on_ranks(steps: ModuleType, given: Arguments, ranks: int) -> list[Tensor]:
    """The same from ranks that hold a slice of the features each."""
    size, centred = given.x.shape[-1], given.bias is not None
    chunk = size // num_chunks(size)
    parts = [given.columns(rank, ranks) for rank in range(ranks)]
    moments = torch.stack([steps.moments(part.x, chunk, centred=centred) for part in parts])
    forward = [steps.normalise(part.x, moments, part.weight, part.bias, chunk, EPSILON) for part in parts]
    _, mean, rstd = forward[0]
    for _, *statistics in forward:
        assert torch.equal(statistics[0], mean) and torch.equal(statistics[1], rstd)
    backward_arguments = [(part.dy, part.x, mean, rstd, part.weight) for part in parts]
    sums = torch.stack([steps.gradient_sums(*arguments, chunk) for arguments in backward_arguments])
    gradients = [
        steps.gradients(*arguments, sums, chunk, centred=centred) for arguments in backward_arguments
    ]
    y = torch.cat([part[0] for part in forward], -1)
    joined = [torch.cat(parts, -1) for parts in zip(*gradients, strict=True) if parts[0] is not None]
    return [y, mean, rstd, *joined]


def true_norm(given: Arguments) -> list[Tensor]:
    """`run`'s results in float64, by autograd."""
    dy = given.dy.double()
    x, weight, *rest = (
        t.double().requires_grad_() for t in (given.x, given.weight, given.bias) if t is not None
    )
    mean = x.mean(-1) if rest else torch.zeros_like(x[..., 0])
    rstd = ((x - mean.unsqueeze(-1)).square().mean(-1) + EPSILON).rsqrt()
    y = (x - mean.unsqueeze(-1)) * rstd.unsqueeze(-1) * weight + (rest[0] if rest else 0)
    gradients = torch.autograd.grad(y, [x, weight, *rest], dy)
    return [*(t.detach() for t in (y, mean, rstd)), *gradients]


def check_against_float64(actual: list[Tensor], given: Arguments) -> None:
    dtype = given.x.dtype
    for place, (value, exact) in enumerate(zip(actual, true_norm(given), strict=True)):
        kept_wide = place in (1, 2)  # mean and rstd
        wanted = torch.promote_types(dtype, torch.float32) if kept_wide else dtype
        assert value.dtype == wanted
        assert_close(value, exact, TOLERANCE[wanted])


def check_ranks(steps: ModuleType, given: Arguments, ranks: int, whole: list[Tensor]) -> None:
    """Every bit of `run`'s results."""
    for value, expected in zip(run_on_ranks(steps, given, ranks), whole, strict=True):
        assert torch.equal(value, expected)
