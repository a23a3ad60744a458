"""Hash and lookup composed from torch operations (SPEC.md section 1, Eq. 2-12).

This file needs torch alone and nothing else of the package: a converted model carries a copy of it.
`hash_codes` and `lookup` are differentiable by autograd. The `*_backward` functions are the same gradients
written out; `ops` uses them so that training keeps only x, codes, weights and the tables between the passes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SUM = 0  # embedding_bag's mode, as its operators number it


def code_dtype(bits: int) -> torch.dtype:
    """The smallest integer type for codes of `bits` bits: uint8 up to 8, int16 up to 15, int32 for 16."""
    return torch.uint8 if bits <= 8 else torch.int16 if bits <= 15 else torch.int32


def _split(x: Tensor, num_tables: int) -> tuple[Tensor, Tensor, Tensor]:
    """z [..., K, tau] in float32 (float64 for float64), its bits, and its signs, where sign(0) = +1.

    Contiguous, because the order of a product over tau, and so its last bit, depends on the strides.
    """
    z = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous().unflatten(-1, (num_tables, -1))
    bits = z >= 0
    return z, bits, bits.to(z.dtype).mul_(2).sub_(1)


def _one_over_sigmoid(magnitude: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """exp(-2|z|/t), and 1 plus that, which is 1 / sigmoid(2|z|/t).

    torch.sigmoid itself would do, but on CPU its last bit depends on where in memory a value lies. exp gives the
    same bits however the chunks are split over ranks or tokens over batches.
    """
    decay = torch.exp(magnitude * (-2 / temperature))
    return decay, 1 + decay


def hash_codes(
    x: Tensor, num_tables: int, temperature: float = 1.0, score: str = "probability"
) -> tuple[Tensor, Tensor]:
    """Codes (Eq. 4, integer) and weights (Eq. 10, x's dtype), both [..., K], of x [..., D]."""
    z, bits, sign = _split(x, num_tables)
    tau = z.shape[-1]
    powers = 2 ** torch.arange(tau, dtype=torch.int32, device=x.device)
    codes = (bits * powers).sum(-1, dtype=torch.int32).to(code_dtype(tau))
    magnitude = z * sign  # not abs(), whose gradient at 0 is 0
    weights = _one_over_sigmoid(magnitude, temperature)[1].prod(-1).reciprocal()
    if score == "scaled_probability":
        weights = weights * magnitude.sum(-1)
    return codes, weights.to(x.dtype)


def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str
) -> Tensor:
    """d x [..., D] from d weights [..., K] and x alone; the weights are computed again."""
    z, _, sign = _split(x, num_tables)
    magnitude = z * sign
    decay, one_over_sigmoid = _one_over_sigmoid(magnitude, temperature)
    d_probability = d_weights.to(z.dtype) / one_over_sigmoid.prod(-1)
    # d log probability / d |z| = (2/t) (1 - sigmoid(2|z|/t)), without the difference's cancellation
    slope = decay.div_(one_over_sigmoid).mul_(2 / temperature)
    if score == "scaled_probability":
        slope = slope.mul_(magnitude.sum(-1, keepdim=True)).add_(1)
    return slope.mul_(sign).mul_(d_probability.unsqueeze(-1)).flatten(-2).to(x.dtype)


def _row_numbers(codes: Tensor, rows_per_table: int) -> Tensor:
    """Codes [..., K] as row numbers [N, K] of all tables laid end to end: int32, which sorts in half the time."""
    num_tables = codes.shape[-1]
    first_row = torch.arange(
        0, num_tables * rows_per_table, rows_per_table, dtype=torch.int32, device=codes.device
    )
    return codes.reshape(-1, num_tables).to(torch.int32) + first_row


def lookup(codes: Tensor, weights: Tensor, tables: Tensor, bias: Tensor | None = None) -> Tensor:
    """y [..., O] = sum_k weight_k * table_k[code_k] + bias (Eq. 11); tables [K, 2**tau, O] give y's dtype."""
    num_tables, rows_per_table, out_features = tables.shape
    y_no = F.embedding_bag(
        _row_numbers(codes, rows_per_table),
        tables.flatten(0, 1),
        per_sample_weights=weights.reshape(-1, num_tables).to(tables.dtype),
        mode="sum",
    )
    y = y_no.view(*codes.shape[:-1], out_features)
    return y if bias is None else y + bias


def lookup_backward(dy: Tensor, codes: Tensor, weights: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    """d weights [..., K] (weights' dtype) and d tables [K, 2**tau, O]; the same bits in every run.

    The reads (one per token and table) are sorted by row, stably. So d weights fetches a row once for all its
    readers, and d tables is itself a lookup, in which each row sums dy over its readers: one writer, no atomics.
    """
    num_tables, rows_per_table, out_features = tables.shape
    dy_no = dy.reshape(-1, out_features).contiguous()
    row, read = _row_numbers(codes, rows_per_table).flatten().sort(stable=True)
    token = (read // num_tables).to(torch.int32)
    row_edges = torch.arange(num_tables * rows_per_table + 1, dtype=torch.int32, device=dy.device)

    # <dy[token], table[row]> of each read: the operator behind F.embedding_bag's gradient, called alone, because
    # autograd would bring its own d tables. It takes the bag of a read from the fifth argument, not from offsets.
    d_weights = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dy_no, tables.flatten(0, 1), row, row_edges[:0], token, _SUM
    )
    d_tables = F.embedding_bag(
        token,
        dy_no,
        torch.searchsorted(row, row_edges, out_int32=True),
        per_sample_weights=weights.flatten()[read].to(tables.dtype),
        mode="sum",
        include_last_offset=True,
    )
    d_weights = torch.empty_like(d_weights).scatter_(0, read, d_weights)
    return d_weights.view(weights.shape).to(weights.dtype), d_tables.view(tables.shape)
