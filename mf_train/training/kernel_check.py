"""Whether the kernels of hash and lookup compute what they should on this machine's device."""

from collections.abc import Callable

import torch
from torch import Tensor

from mf_train.kernels import describe, hash_codes, lookup

_TOKENS, _TABLES, _BITS, _WIDTH = 512, 16, 8, 64
_TOLERANCE = 1e-4  # of the largest value; float32 sums of 16 terms are within 1e-6


def check_kernels(device: torch.device, run: Callable[[Tensor, Tensor, Tensor], Tensor] = lookup) -> str:
    """Hash and look up random features in float32, and compare with the float64 reference on the CPU.

    Returns what computed it, as "Triton kernels". Raises ArithmeticError where the result is wrong.
    """
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, _TABLES * _BITS, generator=numbers)
    tables = torch.randn(_TABLES, 2**_BITS, _WIDTH, generator=numbers)
    expected_codes, expected_weights = hash_codes(x, _TABLES, backend="reference")
    expected = lookup(expected_codes, expected_weights.double(), tables.double(), backend="reference")
    codes, weights = hash_codes(x.to(device), _TABLES)
    y = run(codes, weights, tables.to(device)).cpu().double()
    kind = describe(device)
    wrong = int((codes.cpu().long() != expected_codes.long()).sum())
    difference = float((y - expected).abs().max() / expected.abs().max())
    if wrong or not difference <= _TOLERANCE:  # also NaN
        remedy = ": look for memory errors (nvidia-smi -q -d ECC)" if device.type == "cuda" else ""
        raise ArithmeticError(
            f"{kind} on {device} computed {wrong} of {codes.numel()} codes wrong, and sums that differ by "
            f"{difference:.2g} of the largest{remedy}"
        )
    return kind
