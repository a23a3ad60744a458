"""Fully-connected layers of matrices, whole and of low rank: what memory layers replace."""

from torch import Tensor, nn


class Gather(nn.Module):
    """All features of every token, which a matrix mixes: [..., D] both ways.

    It has no parameters. Tensor parallelism replaces it by one that brings the other ranks' features, [..., D / P] to
    [..., D], and in the backward pass adds up what each rank's outputs give.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


class Matrix(nn.Linear):
    """x W^T + b: gathered features [..., D] -> [..., O], of which a tensor-parallel rank has O / P."""

    def reset_parameters(self) -> None:
        """Draws nothing."""


class LowRank(nn.Module):
    """x A^T B^T + b with A [r, D] and B [O, r]: a matrix of rank r (Greenformers, arXiv 2108.10808, section 3).

    Gathered features [..., D] -> [..., O]. A rank computes r / P of the r values between, and gathers them.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.reduce = Matrix(in_features, rank, bias=False)
        self.gather = Gather()
        self.expand = Matrix(rank, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.expand(self.gather(self.reduce(x)))
        return y
