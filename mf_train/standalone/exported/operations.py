"""What a converted model's folder has in place of `mf_train.kernels`: that, where it is installed, or torch operations.

Surface and results are those of `mf_train.kernels`.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mf_train.kernels.composition import hash_codes as composed_hash_codes
from mf_train.kernels.composition import lookup as composed_lookup
from mf_train.kernels.composition import lookup_int8 as composed_lookup_int8
from mf_train.standalone.exported.installed import KERNELS


def hash_codes(
    x: Tensor, num_tables: int, temperature: float = 1.0, score: str = "probability"
) -> tuple[Tensor, Tensor]:
    """Codes and weights [..., K] of x [..., D]."""
    codes, weights = (composed_hash_codes if KERNELS is None else KERNELS.hash_codes)(
        x, num_tables, temperature, score
    )
    return codes, weights


def lookup(codes: Tensor, weights: Tensor, tables: Tensor, bias: Tensor, *, chunks: int = 1) -> Tensor:
    """y [..., O] of codes and weights [..., K] and tables [K, 2**tau, O]. `chunks` order the sums of training alone."""
    return lookup_all(codes, weights, [tables], [bias])[0]


def lookup_all(
    codes: Tensor, weights: Tensor, tables: Sequence[Tensor], biases: Sequence[Tensor], *, chunks: int = 1
) -> list[Tensor]:
    """`lookup` in each of several sets of tables that read the same codes."""
    if KERNELS is not None:
        results: list[Tensor] = KERNELS.lookup_all(codes, weights, tables, biases)
        return results
    ys = composed_lookup(codes, weights, tables)
    return [y + bias for y, bias in zip(ys, biases, strict=True)]


def lookup_int8(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """y [..., O] of int8 tables [K, 2**tau, O] and their scales [K, 2**tau]."""
    y: Tensor = (composed_lookup_int8 if KERNELS is None else KERNELS.lookup_int8)(
        codes, weights, tables, scales
    )
    return y


def fast_norm(x: Tensor) -> Any:
    """A norm's steps in C++ or Triton for x, or None."""
    return None if KERNELS is None else KERNELS.fast_norm(x)


def fast_loss(logits: Tensor) -> Any:
    """The cross-entropy's steps in C++ or Triton for these logits, or None."""
    return None if KERNELS is None else KERNELS.fast_loss(logits)


def fast_rotary(q: Tensor) -> Any:
    """The rotation of queries and keys in Triton for q, or None."""
    return None if KERNELS is None else KERNELS.fast_rotary(q)
