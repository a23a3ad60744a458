"""Hash and lookup straight from the equations (arXiv 2411.12992, Eq. 2-12): what every backend is tested against.

    bit_i     = 1 if z_k[i] >= 0 else 0         of chunk k of x, tau features
    code_k    = sum_i bit_i * 2^i
    weight_k  = prod_i sigmoid(2 |z_k[i]| / t)
    y         = sum_k weight_k * table_k[code_k] + bias

Everything is computed in float64 and rounded once, at the end. Gradients are autograd's. A lookup gathers
every row that it reads, [..., K, O] in float64: for tests, not for training.
"""

import torch
from torch import Tensor

from .composition import code_dtype


def hash_codes(
    x: Tensor, num_tables: int, temperature: float = 1.0, score: str = "probability"
) -> tuple[Tensor, Tensor]:
    """Codes and weights [..., K] of x [..., D] (Eq. 2-4, 10)."""
    tau = x.shape[-1] // num_tables
    z = x.double().reshape(*x.shape[:-1], num_tables, tau)
    codes = torch.zeros(z.shape[:-1], dtype=torch.int64, device=x.device)
    weights = z.new_ones(z.shape[:-1])
    total = z.new_zeros(z.shape[:-1])
    for i in range(tau):
        bit = z[..., i] >= 0
        magnitude = torch.where(bit, z[..., i], -z[..., i])
        codes = codes + bit * 2**i
        weights = weights * torch.sigmoid(2 * magnitude / temperature)
        total = total + magnitude
    if score == "scaled_probability":
        weights = weights * total
    return codes.to(code_dtype(tau)), weights.to(x.dtype)


def lookup(codes: Tensor, weights: Tensor, tables: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [..., O] = sum_k weight_k * table_k[code_k] + bias (Eq. 11), in the tables' dtype."""
    num_tables = tables.shape[0]
    rows = tables.double()[torch.arange(num_tables, device=tables.device), codes.long()]
    y = (weights.double().unsqueeze(-1) * rows).sum(-2)
    if bias is not None:
        y = y + bias.double()
    return y.to(tables.dtype)


def count_codes(codes: Tensor, counts: Tensor) -> None:
    """Add to counts [K, rows] how often each table's codes [..., K] name each row."""
    for k, codes_n in enumerate(codes.reshape(-1, codes.shape[-1]).long().unbind(-1)):
        counts[k] += torch.bincount(codes_n, minlength=counts.shape[1])
