"""Rotary embedding on the first part of each head, as in Pythia."""

import torch
from torch import Tensor

from mf_train.kernels import fast_rotary

Rotary = tuple[Tensor, Tensor]


def rotary_table(positions: Tensor, size: int, base: float) -> Rotary:
    """Cosine and sine of the rotary angles, float32: positions [S] or [B, S] -> [..., 1, S, size / 2].

    Angle of pair i at position p: p * base^(-2i / size) (RoFormer, arXiv 2104.09864, Eq. 15).
    """
    frequencies = base ** (
        -torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / max(size, 1)
    )
    angles = (positions.to(torch.float32).unsqueeze(-1) * frequencies).unsqueeze(-3)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first features of each head; pairs are (i, i + size / 2), as in GPT-NeoX. x: [B, H, S, head]."""
    cosine, sine = (part.to(x.dtype) for part in rotary)
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def rotate_both(q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys, in one kernel where there is one."""
    fast = fast_rotary(q)
    if fast is not None:
        turned_q, turned_k = fast.rotate(q, k, rotary)
        return turned_q, turned_k
    return rotate(q, rotary), rotate(k, rotary)
