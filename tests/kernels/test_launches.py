"""How many launches a block is, and how many bytes its norms move: docs/kernels.md has the table."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from torch import Tensor, nn

from mf_train.config import ModelConfig
from mf_train.config.model import NormKind
from mf_train.kernels import composition, triton_backend
from mf_train.model.block import Block
from mf_train.model.norm import Norm
from tests.kernels.launches import Launches, launches

__all__ = ["launches"]

BATCH, LENGTH = 32, 2048
SWITCHED_OFF = ("mf_train.model.norm.fast_norm", lambda _: None)


def run_norm(launches: Launches, kind: NormKind, ranks: int) -> tuple[int, int, float]:
    """Launches forward and backward, and bytes an element in both, of a rank's slice of 1024 bfloat16 features."""
    norm = Norm(1024, kind, 1e-5)
    if ranks > 1:
        part = Norm(1024 // ranks, kind, 1e-5)
        norm.weight, norm.bias = part.weight, part.bias
        norm.gather = lambda sums: sums.new_empty(ranks, *sums.shape)  # what is sent is counted elsewhere
    norm = norm.bfloat16().to("meta")
    shape = (BATCH * LENGTH, 1024 // ranks)
    x = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with launches:
        y = norm(x)
        forward = launches.total()
        torch.autograd.grad(y, [x, *norm.parameters()], torch.empty_like(x))
    return forward, launches.total() - forward, launches.bytes / x.numel()


# x read, y written, x and dy read, dx written: 10 bytes; each exchange reads its tensors once more. The rest are the
# parts of the affine map's gradients (1 byte) and a few numbers a token.
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("ranks", "allowed"), [(1, (1, 4, 11.1)), (8, (2, 5, 18.4))])
def test_launches_and_bytes_of_a_norm(
    ranks: int, allowed: tuple[int, int, float], kind: NormKind, launches: Launches
) -> None:
    found = run_norm(launches, kind, ranks)
    assert all(a <= b for a, b in zip(found, allowed, strict=True)), (found, launches.counts)
    assert found[2] > 10 + 6 * (ranks > 1)


def test_torch_operations_are_counted_too(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without which the figures above would mean little: a LayerNorm of theirs is over a hundred launches."""
    monkeypatch.setattr(*SWITCHED_OFF)
    forward, backward, moved = run_norm(launches, "layernorm", 1)
    assert forward > 30 and backward > 80 and moved > 200


class _Sum(nn.Module):
    """In the place of attention, whose launches are torch's own."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        return query + key + value


def run_block(launches: Launches) -> tuple[int, int]:
    """Launches of a block of tiny but for attention, forward and backward, in bfloat16."""
    config = ModelConfig(hidden_size=512, num_layers=6, num_heads=8, bits=8, expand_bits=2)
    with torch.device("meta"):
        block = Block(config, 0).bfloat16()
        x = torch.empty(BATCH, LENGTH, 512, dtype=torch.bfloat16, requires_grad=True)
        nothing = torch.empty(0)
    block.attention = _Sum()
    with launches:
        y = block(x, (nothing, nothing))
        forward = launches.total()
        torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(x))
    return forward, launches.total() - forward


def test_launches_of_a_block(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, backward = run_block(launches)
    # 3 norms, 3 hashes, 5 lookups, 2 residual sums and the 2 in the place of attention
    assert forward == 15
    assert backward <= 75, launches.counts
    monkeypatch.setattr(*SWITCHED_OFF)
    monkeypatch.setattr(triton_backend, "column_sums", composition.column_sums)
    launches.counts.clear()
    before = run_block(launches)
    assert before[0] > 6 * forward and before[1] > 6 * backward, (before, launches.counts)
