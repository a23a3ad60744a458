"""The Triton rotation of queries and keys beside torch operations in float64: run as `triton_cases.py` is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mf_train.kernels import triton_rotary
from mf_train.model.attention.rotary import Rotary, rotary_table, rotate
from tests.closeness import assert_close
from tests.kernels.triton_cases import DEVICE, INTERPRETED, generator, normal


def heads(seed: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and their gradients [B, H, S, head], laid out as attention's: [B, S, H, head]."""
    g = generator(seed)
    batch, count, length, size = shape
    return [normal(g, batch, length, count, size).to(dtype).transpose(1, 2) for _ in range(4)]


def run(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, rotary: Rotary) -> list[Tensor]:
    """Both turned, and the gradients of both."""
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    turned = triton_rotary.rotate(*leaves, rotary)
    return [*(t.detach() for t in turned), *torch.autograd.grad(turned, leaves, (dq, dk))]


def run_reference(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, rotary: Rotary) -> list[Tensor]:
    leaves = [q.double().requires_grad_(), k.double().requires_grad_()]
    turned = [rotate(leaf, rotary) for leaf in leaves]
    return [*(t.detach() for t in turned), *torch.autograd.grad(turned, leaves, (dq.double(), dk.double()))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("own_positions", [False, True])
@pytest.mark.parametrize(
    ("shape", "turned"),
    [
        ((2, 3, 5, 64), 16),
        ((1, 2, 70, 16), 16),
        ((2, 1, 1, 24), 6),
        ((3, 2, 4, 10), 2),
        ((2, 2, 3, 8), 0),
        ((0, 2, 3, 8), 4),
    ],
    ids=str,
)
def test_rotary(shape: tuple[int, ...], turned: int, own_positions: bool, dtype: torch.dtype) -> None:
    batch, _, length, _ = shape
    positions = torch.arange(length, device=DEVICE) + 3
    if own_positions:  # of every row, as where documents are packed
        positions = torch.randint(100, (batch, length), generator=generator(1), device=DEVICE)
    rotary = rotary_table(positions, turned, 10000.0)
    inputs = heads(turned, *shape, dtype=dtype)
    for actual, expected in zip(run(*inputs, rotary), run_reference(*inputs, rotary), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rotary_of_some_heads_has_the_bits_of_all(dtype: torch.dtype) -> None:
    inputs = heads(2, 2, 8, 9, 32, dtype=dtype)
    rotary = rotary_table(torch.arange(9, device=DEVICE), 8, 10000.0)
    whole = run(*inputs, rotary)
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            part = run(*(x.chunk(ranks, 1)[rank] for x in inputs), rotary)
            for mine, all_of_them in zip(part, whole, strict=True):
                assert torch.equal(mine, all_of_them.chunk(ranks, 1)[rank])


def test_rotary_of_any_layout() -> None:
    inputs = heads(3, 2, 3, 5, 16, dtype=torch.float32)
    rotary = rotary_table(torch.arange(5, device=DEVICE), 8, 10000.0)
    for layout in (torch.Tensor.contiguous, lambda x: x.mT.contiguous().mT):
        found = run(*(layout(x) for x in inputs), rotary)
        assert all(torch.equal(a, b) for a, b in zip(found, run(*inputs, rotary), strict=True))


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what kernels load and store")
def test_rotary_is_one_launch_each_way() -> None:
    """That reads and writes every number of q and k once, and of the table 8 pairs for each of a token's heads."""
    from tests.kernels.traffic import count_traffic

    q, k, dq, dk = heads(4, 2, 4, 16, 64, dtype=torch.bfloat16)
    rotary = rotary_table(torch.arange(16), 16, 10000.0)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    with count_traffic() as traffic:
        torch.autograd.grad(triton_rotary.rotate(*leaves, rotary), leaves, (dq, dk))
    table = q.numel() // 64 * 8 * 2 * 4
    assert traffic.launches == [4 * q.nbytes + table] * 2
