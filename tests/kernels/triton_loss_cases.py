"""The Triton steps of the cross-entropy beside torch's and float64: run as `triton_cases.py` is."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.kernels import triton_loss
from mf_train.model import head as model_head
from mf_train.model import loss_steps
from mf_train.model.head import IGNORED, Head
from mf_train.model.sums import num_chunks
from tests.closeness import TOLERANCE, assert_close
from tests.kernels.triton_cases import DEVICE, INTERPRETED, SLOW, compiled_only, generator, normal

STEPS = pytest.mark.parametrize("steps", [triton_loss, loss_steps], ids=["triton", "torch"])


def random_logits(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits [..., V] far from zero, and targets of which some are -1."""
    g = generator(seed)
    logits = (normal(g, *shape) * 4 - 90).to(dtype)
    return logits, torch.randint(-1, shape[-1], shape[:-1], generator=g, device=DEVICE)


@STEPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lead", "size"),
    [((), 24), ((0,), 24), ((1,), 1), ((3, 4), 7), ((3,), 1000), ((2, 2), 2 * 2049)],
    ids=str,
)
def test_loss_steps(lead: tuple[int, ...], size: int, dtype: torch.dtype, steps: ModuleType) -> None:
    logits, target = random_logits(size, *lead, size, dtype=dtype)
    chunk = size // num_chunks(size)
    sums = steps.sums(logits, target, chunk)
    most, totals, picked = sums.unbind(-2)
    assert sums.dtype == torch.float32
    chunks = logits.double().unflatten(-1, (-1, chunk))
    assert torch.equal(most, chunks.amax(-1).float())
    assert_close(totals, (chunks - chunks.amax(-1, keepdim=True)).exp().sum(-1), 2e-6)
    is_target = F.one_hot(target + 1, size + 1)[..., 1:].unflatten(-1, (-1, chunk))
    assert torch.equal(picked.double(), (chunks * is_target).sum(-1))

    normaliser = torch.logsumexp(logits.double(), -1).float()
    factor = normal(generator(size + 1), 1, *lead)[0]
    d_logits = steps.gradient(logits, normaliser, factor, target)
    exact = (logits.double() - normaliser.double().unsqueeze(-1)).exp() - is_target.flatten(-2)
    assert d_logits.dtype == dtype
    assert_close(d_logits, exact * factor.double().unsqueeze(-1), TOLERANCE[dtype])
    taken = logits.clone()
    assert steps.gradient(taken, normaliser, factor, target, overwrite=True) is taken
    assert torch.equal(taken, d_logits)
    d_logits = steps.gradient(logits, normaliser, factor, target, softcap=120.0)
    exact *= 1 - (logits.double() / 120).square()
    assert_close(d_logits, exact * factor.double().unsqueeze(-1), TOLERANCE[dtype])


def test_loss_of_strided_logits() -> None:
    logits, target = random_logits(1, 9, 40)
    strided = logits.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(triton_loss.sums(strided, target, 5), triton_loss.sums(logits, target, 5))
    numbers = (normal(generator(2), 9), normal(generator(3), 9), target)
    assert torch.equal(triton_loss.gradient(strided, *numbers), triton_loss.gradient(logits, *numbers))


class Piece(Head):
    """A rank's part of a head, with what the other ranks have for it."""

    def __init__(self, vocab_size: int, first: int, everybody: Tensor) -> None:
        with torch.device("meta"):
            super().__init__(1, vocab_size)
        self.first_token, self.everybody = first, everybody

    def gather_sums(self, sums: Tensor) -> Tensor:
        assert any(torch.equal(sums, theirs) for theirs in self.everybody.unbind(-1))
        return self.everybody


def losses_and_gradient(head: Head, logits: Tensor, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    losses = head.token_losses(leaf * 1, targets, raw=True)
    (gradient,) = torch.autograd.grad(losses, leaf, share)
    return losses.detach(), gradient


@pytest.fixture
def chosen_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(model_head, "fast_loss", lambda logits: request.param)
    return request.param


BOTH = pytest.mark.parametrize(
    "chosen_steps", [triton_loss, loss_steps], indirect=True, ids=["triton", "torch"]
)


PIECES = [(1, torch.float32), (21, torch.float32), (21, torch.bfloat16), (2053, torch.bfloat16)]


@BOTH
@pytest.mark.parametrize(
    ("piece", "ranks"),
    [
        pytest.param(piece, ranks, marks=[] if ranks == often else SLOW)
        for piece, often in zip(PIECES, (8, 2, 4, 8), strict=True)
        for ranks in (2, 4, 8)
    ],
    ids=str,
)
def test_loss_of_pieces_of_the_vocabulary(
    piece: tuple[int, torch.dtype], ranks: int, chosen_steps: ModuleType
) -> None:
    """Losses and gradients are those of float64, and of the whole vocabulary to the last bit."""
    chunk, dtype = piece
    size = 8 * chunk
    logits, targets = random_logits(ranks, 5, size, dtype=dtype)
    targets = torch.where(targets < 0, IGNORED, targets)
    targets[0], targets[1], targets[2] = IGNORED, 0, size - 1
    share = torch.rand(5, generator=generator(chunk), device=DEVICE)
    losses, gradient = losses_and_gradient(Head(1, size), logits, targets, share)

    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, targets, reduction="none")
    (exact_gradient,) = torch.autograd.grad(exact, leaf, share.double())
    assert_close(losses, exact, 5e-6)
    # the exponent is rounded to a unit of the logits' size, about 100
    assert_close(gradient, exact_gradient, TOLERANCE[dtype] + 1e-5)
    assert losses[0] == 0 and not gradient[0].any()

    width = size // ranks
    locals_of = [
        torch.where((targets >= first) & (targets < first + width), targets - first, -1)
        for first in range(0, size, width)
    ]
    parts = [
        chosen_steps.sums(part.contiguous(), local, chunk)
        for part, local in zip(logits.chunk(ranks, -1), locals_of, strict=True)
    ]
    everybody = torch.stack(parts, -1)
    for rank, part in enumerate(logits.chunk(ranks, -1)):
        piece = Piece(size, rank * width, everybody)
        found, d_part = losses_and_gradient(piece, part, targets, share)
        assert torch.equal(found, losses)
        assert torch.equal(d_part, gradient.chunk(ranks, -1)[rank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_loss_of_logits_that_are_not_finite(
    value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the target, elsewhere, in a whole chunk, in all logits, where the target is ignored: as torch operations."""
    logits, targets = random_logits(7, 7, 40, dtype=dtype)
    targets = targets.clamp(min=0)
    targets[0], targets[1], targets[4], targets[5] = 3, 4, 11, IGNORED
    logits[0, 3], logits[1, 3], logits[2], logits[3, 5:10], logits[4, 10:15] = (value,) * 5
    logits[5, 39] = value
    share = torch.rand(7, generator=generator(8), device=DEVICE)
    results = []
    for steps in (triton_loss, loss_steps):
        monkeypatch.setattr(model_head, "fast_loss", lambda logits, steps=steps: steps)
        results.append(losses_and_gradient(Head(1, 40), logits, targets, share))
    exact = F.cross_entropy(logits.double(), targets, reduction="none")
    (losses, gradient), (torch_losses, torch_gradient) = results
    for each in (losses, torch_losses):
        torch.testing.assert_close(each.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert losses[6].isfinite() and gradient[6].isfinite().all()
    assert losses.isfinite().all() or value != -math.inf or not losses[[0, 2, 4]].isfinite().any()
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, torch_gradient, rtol=2 * rounding, atol=1e-5, equal_nan=True)


@BOTH
def test_loss_that_takes_the_logits_runs_back_once(chosen_steps: ModuleType) -> None:
    logits, targets = random_logits(3, 4, 24)
    logits.requires_grad_()
    losses = Head(1, 24).token_losses(logits * 1, targets.clamp(min=0), raw=True)
    losses.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@compiled_only
def test_loss_of_more_than_two_to_the_31_logits() -> None:
    tokens, size = 43000, 50304
    logits = torch.zeros(tokens, size, device=DEVICE, dtype=torch.bfloat16)
    assert logits.numel() > 2**31
    logits[-1, -3:] = 10
    target = torch.full((tokens,), size - 1, device=DEVICE)
    sums = triton_loss.sums(logits, target, size // 8)
    assert sums[-1, 0].tolist() == [0] * 7 + [10] and sums[-1, 2].tolist() == [0] * 7 + [10]
    normaliser = torch.logsumexp(logits[-1].double(), -1).float().expand(tokens)
    factor = torch.ones(tokens, device=DEVICE)
    d_logits = triton_loss.gradient(logits, normaliser, factor, target, overwrite=True)
    last = torch.full((3,), 10.0, device=DEVICE).double() - normaliser[0].double()
    assert_close(d_logits[-1, -3:], last.exp() - torch.tensor([0, 0, 1], device=DEVICE), torch.bfloat16)


@compiled_only
def test_loss_takes_no_second_copy_of_the_logits() -> None:
    logits = torch.randn(4096, 50304, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(50304, (4096,), device=DEVICE)
    mine = logits * 1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = Head(1, 50304).token_losses(mine, targets, raw=True)
    torch.autograd.grad(losses.sum(), mine)
    assert torch.cuda.max_memory_allocated() - before < 0.05 * mine.nbytes


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter counts what kernels load and store")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_moves_each_logit_three_times(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read for the sums; read and overwritten by the gradient. At most 12 bytes a logit, and no copy in float32."""
    from tests.kernels.traffic import count_traffic

    monkeypatch.setattr(model_head, "fast_loss", lambda logits: triton_loss)
    tokens, size = 3, 50304
    logits = torch.randn(tokens, size, generator=generator(9)).to(dtype).requires_grad_()
    mine, targets = logits.view(tokens, size), torch.randint(size, (tokens,), generator=generator(10))
    with count_traffic() as traffic:
        losses = Head(1, size).token_losses(mine, targets, raw=True)
        torch.autograd.grad(losses, mine, torch.ones(tokens))
    of_all_logits = [moved / logits.nbytes for moved in traffic.launches if 2 * moved > logits.nbytes]
    assert of_all_logits == pytest.approx([1, 2], rel=0.01)
    assert traffic.bytes <= 3.02 * logits.nbytes
    assert len(traffic.launches) <= 30
