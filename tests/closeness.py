"""How near results are to those of an independent reference in float64."""

import torch
from torch import Tensor

# Relative to the largest entry: a float32 sum of some hundred terms, and a few roundings of the narrow types.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | torch.dtype) -> None:
    """The largest error is at most `tolerance`, or a dtype's TOLERANCE, times the largest entry of `expected`."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    allowed = TOLERANCE[tolerance] if isinstance(tolerance, torch.dtype) else tolerance
    actual, expected = actual.detach().double(), expected.detach().double()
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= allowed * scale, f"largest error {error:.2e}, allowed {allowed:.1e} of {scale:.2e}"
