"""How near a backend has to be to the reference, which computes in float64."""

from __future__ import annotations

import torch
from torch import Tensor

# Triton's interpreter truncates to bfloat16 where a GPU rounds.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Every entry is right to `tolerance` of the largest one."""
    assert actual.shape == expected.shape
    if actual.numel():
        error, scale = (actual.double() - expected.double()).abs().max(), expected.double().abs().max()
        assert error <= tolerance * scale, (float(error), float(scale))
