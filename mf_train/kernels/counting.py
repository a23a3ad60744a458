"""How often each row of each table is read: codes added to integer counts, without a wait for the device."""

import torch
from torch import Tensor

from . import cpu, reference
from .backends import fast_counting

COUNT_BACKENDS = ("auto", "composition", "cpu", "reference")


def count_codes(codes: Tensor, counts: Tensor, *, backend: str = "auto") -> None:
    """Add to `counts[k, row]` how often table k's codes name the row. In place.

    Args:
        codes: [..., K] uint8, int16, int32 or int64, each in [0, 2**tau); a slice of more tables' codes too. On a CPU
            others are an error; on a GPU, where looking would wait for the device, Triton leaves them out and
            torch operations do not look.
        counts: int64 [K, 2**tau], contiguous, on the same device.
        backend: one of COUNT_BACKENDS; "auto" is C++ ("cpu") or Triton where they run, else torch operations
            ("composition").

    Raises:
        ValueError: arguments that do not fit together, named with their values.
    """
    if backend not in COUNT_BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(COUNT_BACKENDS)}, got {backend!r}")
    rows = counts.shape[-1]
    if (
        counts.dtype != torch.int64
        or counts.dim() != 2
        or codes.shape[-1:] != counts.shape[:1]
        or rows & (rows - 1)
        or not counts.is_contiguous()
        or codes.device != counts.device
    ):
        raise ValueError(
            "codes [..., K] need counts that are int64 [K, 2**tau], contiguous and on their device; got codes "
            f"{tuple(codes.shape)} on {codes.device} and counts {counts.dtype} {tuple(counts.shape)} on {counts.device}"
        )
    if not codes.numel():
        return
    if backend == "reference":
        reference.count_codes(codes, counts)
        return
    codes_nk = codes.flatten(0, -2)  # a view where tokens lie at one distance
    if codes_nk.stride(-1) != 1:
        codes_nk = codes_nk.contiguous()
    fast = cpu if backend == "cpu" else fast_counting(counts) if backend == "auto" else None
    if fast is not None:
        fast.count_codes(codes_nk, counts)
    else:
        _count(codes_nk, counts)


def _count(codes_nk: Tensor, counts: Tensor) -> None:
    """By torch operations. torch.bincount would wait for the device to learn the largest code."""
    num_tables, rows = counts.shape
    if codes_nk.is_cpu and not (int(codes_nk.min()) >= 0 and int(codes_nk.max()) < rows):
        raise ValueError(f"codes must be in [0, {rows}), got codes from {codes_nk.min()} to {codes_nk.max()}")
    first_row = torch.arange(0, num_tables * rows, rows, device=counts.device)
    row_nk = codes_nk.long() + first_row
    ones = torch.ones((), dtype=torch.int64, device=counts.device).expand(row_nk.numel())
    counts.view(-1).scatter_add_(0, row_nk.flatten(), ones)
