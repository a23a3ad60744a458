"""How many launches a block is, and how many bytes its norms move: docs/kernels.md has the table."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from mf_train.config import ModelConfig
from mf_train.config.model import NormKind
from mf_train.kernels import composition, triton_backend
from mf_train.model.block import MemoryFormerBlock
from mf_train.model.norm import Norm
from mf_train.model.attention import rotary_table
from tests.kernels.launches import Launches, launches

__all__ = ["launches"]

TOKENS = 32 * 2048


def run_norm(launches: Launches, kind: NormKind, ranks: int, features: int = 1024) -> tuple[int, int, float]:
    """Launches forward and backward, and bytes an element in both, in bfloat16, of a rank's slice of the features."""
    norm = Norm(features, kind, 1e-5)
    if ranks > 1:
        part = Norm(features // ranks, kind, 1e-5)
        norm.weight, norm.bias = part.weight, part.bias
        norm.gather = lambda sums: sums.new_empty(ranks, *sums.shape)
    norm = norm.bfloat16().to("meta")
    x = torch.empty(TOKENS, features // ranks, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with launches:
        y = norm(x)
        forward = launches.total()
        torch.autograd.grad(y, [x, *norm.parameters()], torch.empty_like(x))
    return forward, launches.total() - forward, launches.bytes / x.numel()
