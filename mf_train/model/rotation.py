"""A learned rotation of what a memory layer hashes: which half-spaces the bits of a code are."""

import torch
from torch import Tensor, nn


class Rotation(nn.Module):
    """Features [..., D] -> [..., D]: those of each of K tables, tau at a time, times a rotation of theirs [tau, tau].

    The Cayley transform of a skew-symmetric matrix, R = (I - S) (I + S)^-1 with S = A - A^T, makes a rotation of any
    A = `skew` [K, tau, tau], and none of 0, where training begins. It is computed in float32 at least. A table reads
    its own features alone, as without a rotation, so tensor parallelism splits tables and exchanges nothing for it.
    """

    def __init__(self, num_tables: int, bits: int) -> None:
        super().__init__()
        self.skew = nn.Parameter(torch.empty(num_tables, bits, bits))

    def forward(self, x: Tensor) -> Tensor:
        num_tables, bits, _ = self.skew.shape
        wide = self.skew.to(torch.promote_types(self.skew.dtype, torch.float32))
        s, one = wide - wide.mT, torch.eye(bits, dtype=wide.dtype, device=wide.device)
        # without a check for zeros on the diagonal, which would wait for a GPU: I + S of a skew S is never singular
        rotations = torch.linalg.solve_ex(one + s, one - s, left=False)[0].to(x.dtype)
        return torch.einsum("...kt,ktu->...ku", x.unflatten(-1, (num_tables, bits)), rotations).flatten(-2)
