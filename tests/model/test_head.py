"""Logits in chunks of the vocabulary, and the cross-entropy, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.model.head import Head, soft_capped


def random_case(
    vocab_size: int, scale: float, dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets of which some are ignored, and the gradient of each loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(4, 9, vocab_size, generator=generator, dtype=torch.float64) * scale).to(dtype)
    targets = torch.randint(vocab_size, (4, 9), generator=generator)
    targets[0, 0], targets[0, 1], targets[1, 3], targets[3, 8] = 0, vocab_size - 1, -100, -100
    return logits, targets, torch.rand(4, 9, generator=generator, dtype=torch.float64)


def torch_losses(logits: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)], ids=str
)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("vocab_size", [2, 7, 100, 4096, 50304])
def test_losses_and_gradient(vocab_size: int, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    logits, targets, share = random_case(vocab_size, scale, dtype, vocab_size)
    head = Head(4, vocab_size)
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses, expected = head.token_losses(ours, targets), torch_losses(theirs, targets)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=5 * tolerance)
    assert (losses[targets == -100] == 0).all()

    losses.backward(share.to(losses.dtype))
    expected.backward(share)
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
    # the exponent is rounded to a unit of the logits' size; bfloat16 rounds the gradient once more
    tolerance += logits.detach().abs().max().item() * torch.finfo(losses.dtype).eps
    tolerance += 8e-3 if dtype == torch.bfloat16 else 0
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)
    assert (ours.grad[targets == -100] == 0).all()


def test_one_logit_above_all_others_and_infinite_ones_below() -> None:
    logits = torch.full((1, 3, 16), -1e4)
    logits[0, :, 5] = 1e4
    logits[0, 2, :5] = -torch.inf
    targets = torch.tensor([[5, 6, 5]])
    losses = Head(4, 16).token_losses(logits.requires_grad_(), targets)
    assert losses.tolist() == [[0.0, 2e4, 0.0]]
    losses.sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_z_loss(dtype: torch.dtype, tolerance: float) -> None:
    """Its gradient by autograd, also where log(Z) is below 0; the losses do not show it."""
    head = Head(4, 96)
    logits, targets, share = random_case(96, 3.0, dtype, 2)
    logits[1::2] -= 20
    head.z_loss = 0.01
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = head.token_losses(ours, targets)
    expected = torch_losses(theirs, targets)
    added = torch.where(targets == -100, 0, 0.01 * theirs.logsumexp(-1).square())
    ((expected + added) * share).sum().backward()
    losses.backward(share.to(dtype))
    torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)
    assert added.max() > 0.5 and (targets == -100).any()


@pytest.mark.parametrize("steps", ["C++", "torch"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str
)
def test_soft_cap(dtype: torch.dtype, tolerance: float, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses and gradients of raw logits, capped and overwritten, and of capped ones; the z-loss of the latter."""
    if steps == "torch":
        monkeypatch.setattr("mf_train.model.head.fast_loss", lambda _: None)
    head = Head(6, 96, softcap=5.0).to(dtype)
    head.z_loss = 0.01
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    x = (torch.randn(4, 9, 6, generator=generator, dtype=torch.float64) * 2).to(dtype).requires_grad_()
    _, targets, share = random_case(96, 1.0, dtype, 3)
    wide_x, wide_weight = (each.detach().double().requires_grad_() for each in (x, head.weight))
    capped = 5 * torch.tanh(wide_x @ wide_weight.t() / 5)
    assert 4 < capped.abs().max() < 5
    expected = torch_losses(capped, targets)
    added = torch.where(targets == -100, 0, 0.01 * capped.logsumexp(-1).square())
    wanted = torch.autograd.grad(((expected + added) * share).sum(), (wide_x, wide_weight))

    logits = soft_capped(head(x), 5.0)
    torch.testing.assert_close(logits.double(), capped, rtol=tolerance, atol=tolerance)
    for losses in (
        head.token_losses(logits, targets),
        head.token_losses(head(x), targets, raw=True),
    ):
        torch.testing.assert_close(losses.double(), expected, rtol=tolerance, atol=tolerance)
        gradients = torch.autograd.grad(losses, (x, head.weight), share.to(losses.dtype))
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_the_likeliest_token_of_all_ranks() -> None:
    logits = torch.randint(3, (50, 24), generator=torch.Generator().manual_seed(1)).float()  # with equal ones
    pairs: list[Tensor] = []

    class Piece(Head):
        def gather_sums(self, sums: Tensor) -> Tensor:
            pairs.append(sums)
            return torch.stack(pairs, -1)

    head = Piece(4, 24)
    for head.first_token in (0, 6, 12, 18):
        found = head.likeliest(logits[:, head.first_token : head.first_token + 6])
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert found.tolist() == expected == Head(4, 24).likeliest(logits).tolist()


def test_gradcheck() -> None:
    logits, targets, _ = random_case(24, 2.0, torch.float64, 1)
    head = Head(4, 24)
    assert torch.autograd.gradcheck(lambda x: head.token_losses(x, targets), (logits.requires_grad_(),))


@pytest.mark.parametrize("vocab_size", [9, 20, 64])
def test_logits_are_the_product_with_every_row(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    head = Head(6, vocab_size).double()
    with torch.no_grad():
        head.weight.normal_(generator=generator)
    x = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = head(x)
    expected = torch.einsum("bsd,vd->bsv", x, head.weight)
    torch.testing.assert_close(logits, expected)
    dy = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(logits, [x, head.weight], dy),
        torch.autograd.grad(expected, [x, head.weight], dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
