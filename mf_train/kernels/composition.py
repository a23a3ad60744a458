"""Hash and lookup composed from torch operations (arXiv 2411.12992, Eq. 2-12).

This file needs torch alone and nothing else of the package: a converted model carries a copy of it.
`hash_codes` and `lookup` are differentiable by autograd. The `*_backward` functions are the same gradients
written out; `ops` uses them so that training keeps only x, codes, weights and the tables between the passes.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# where a gradient goes: the sums of several, in float32, and whether they hold anything yet
Sum = tuple[Tensor, bool]

_SUM = 0  # embedding_bag's mode, as its operators number it
_GATHERED_ELEMENTS = 2**23  # rows of int8 tables that are widened to float32 at a time: 32 MiB


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


def _check_codes(codes: Tensor, tables: Tensor) -> None:
    """Refuse codes that name no row of their table: ValueError on a CPU, an asynchronous assertion on a GPU."""
    rows = tables.shape[1]
    if torch.iinfo(codes.dtype).max < rows or codes.numel() == 0 or torch.compiler.is_compiling():
        return
    if codes.device.type == "cpu":
        least, most = (int(value) for value in codes.aminmax())
        if least < 0 or most >= rows:
            raise ValueError(
                f"codes must be in [0, {rows}) for tables of shape {tuple(tables.shape)}, "
                f"got codes from {least} to {most}"
            )
    else:
        torch._assert_async(((codes >= 0) & (codes < rows)).all(), f"codes must be in [0, {rows})")


def _row_numbers(codes: Tensor, rows_per_table: int) -> Tensor:
    """Codes [..., K] as row numbers [N, K] of all tables laid end to end.

    int32, which sorts in half the time, unless rows or reads are too many to number in it.
    """
    num_tables = codes.shape[-1]
    rows = num_tables * rows_per_table
    dtype = torch.int32 if max(rows, codes.numel()) < 2**31 else torch.int64
    first_row = torch.arange(0, rows, rows_per_table, dtype=dtype, device=codes.device)
    return codes.reshape(-1, num_tables).to(dtype) + first_row


def lookup(
    codes: Tensor, weights: Tensor, tables: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> list[Tensor]:
    """For each set of tables [K, 2^tau, O]: y [..., O] = sum_k weight_k * table_k[code_k] (Eq. 11), in its dtype.

    `biases` [O], of each set or of none, are added to what was rounded.
    """
    num_tables, rows_per_table = tables[0].shape[:2]
    _check_codes(codes, tables[0])
    row_nk = _row_numbers(codes, rows_per_table)
    weights_nk = weights.reshape(-1, num_tables).to(tables[0].dtype)
    results = []
    for table in tables:
        y_no = F.embedding_bag(row_nk, table.flatten(0, 1), per_sample_weights=weights_nk, mode="sum")
        results.append(y_no.view(*codes.shape[:-1], table.shape[-1]))
    return add_biases(results, biases)


def add_biases(ys: list[Tensor], biases: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors with their biases added, if there are any."""
    for y, bias in zip(ys, biases, strict=False):
        y += bias
    return ys


def lookup_backward(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    chunks: int = 1,
    sums: Sequence[Sum] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """d weights [..., K] (float32, or float64), summed over the sets, and each set's d tables; same bits in every run.

    d weights is summed over `chunks` equal chunks of columns, of all sets together, and then over pairs of chunks.
    With `sums` d tables go there, and none are returned.

    The reads (one per token and table) are sorted by row, stably. So d weights fetches a row once for all its
    readers, and d tables is itself a lookup, in which each row sums dy over its readers: one writer, no atomics.
    """
    num_tables, rows_per_table = tables[0].shape[:2]
    row, read = _row_numbers(codes, rows_per_table).flatten().sort(stable=True)
    token = (read // num_tables).to(row.dtype)
    row_edges = torch.arange(num_tables * rows_per_table + 1, dtype=row.dtype, device=codes.device)
    offsets = torch.searchsorted(row, row_edges, out_int32=row.dtype == torch.int32)
    read_weights = weights.flatten()[read].to(tables[0].dtype)

    dys_no = [dy.reshape(-1, dy.shape[-1]).contiguous() for dy in dys]
    sum_dtype = torch.promote_types(tables[0].dtype, torch.float32)

    def chunk_products(chunk: int) -> Tensor:
        total = torch.zeros((), dtype=sum_dtype, device=codes.device)
        for dy_no, table in zip(dys_no, tables, strict=True):
            # Copies, which lie in memory alike for every number of chunks: a product's last bit may depend on that.
            dy_nc, rows_c = (
                _columns(whole, chunk, chunks, sum_dtype) for whole in (dy_no, table.flatten(0, 1))
            )
            # <dy[token], table[row]> of each read: the operator behind F.embedding_bag's gradient, called alone,
            # because autograd would bring its own d tables. It takes a read's bag from the fifth argument, not offsets.
            total = total + torch.ops.aten._embedding_bag_per_sample_weights_backward(
                dy_nc, rows_c, row, row_edges[:0], token, _SUM
            )
        return total

    products = tree_sum(map(chunk_products, range(chunks)))
    d_weights = torch.empty_like(products).scatter_(0, read, products)

    d_tables = []
    for dy_no, table in zip(dys_no, tables, strict=True):
        d_table = F.embedding_bag(
            token, dy_no, offsets, per_sample_weights=read_weights, mode="sum", include_last_offset=True
        )
        d_tables.append(d_table.view(table.shape))
    return d_weights.view(weights.shape), d_tables if sums is None else add_to(sums, d_tables)


def add_to(sums: Sequence[Sum], gradients: Sequence[Tensor]) -> list[Tensor]:
    """Add each gradient to its sum, or put it there; returns nothing that is left."""
    for (total, holds), gradient in zip(sums, gradients, strict=True):
        if holds:
            total.add_(gradient)
        else:
            total.copy_(gradient)
    return []


def _columns(whole: Tensor, chunk: int, chunks: int, dtype: torch.dtype) -> Tensor:
    """A copy of one of `chunks` equal chunks of columns."""
    width = whole.shape[1] // chunks
    return whole.narrow(1, chunk * width, width).to(dtype, copy=True, memory_format=torch.contiguous_format)


def tree_sum(parts: Iterable[Tensor]) -> Tensor:
    """Sum of 1, 2, 4 or 8 tensors of one shape by neighbouring pairs, in their own memory; few are held at once."""
    sums: list[Tensor] = []
    for number, part in enumerate(parts, 1):
        sums.append(part)
        while number % 2 == 0:
            right = sums.pop()
            sums[-1] += right
            number //= 2
    return sums[0]


def column_sums(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last: [..., D] -> [D] float32 (float64 for float64).

    By halves, so that a column's bits depend on that column alone: torch.sum adds the last few columns otherwise.
    """
    x_nd = x.reshape(-1, x.shape[-1]).to(torch.promote_types(x.dtype, torch.float32))
    while len(x_nd) > 1:
        half, last = len(x_nd) // 2, x_nd[-1:]
        x_nd = torch.cat((x_nd[:half] + x_nd[half : 2 * half], last[: len(x_nd) % 2]))
    return x_nd.sum(0)  # of one row, or none


def lookup_int8(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """y [..., O] = sum_k weight_k * scale_k[code_k] * table_k[code_k], in weights' dtype; float32 sums, no gradient.

    tables [K, 2^tau, O] int8, scales [K, 2^tau] float32. Rows are gathered, for a few tokens at a time.
    """
    num_tables, rows_per_table, out_features = tables.shape
    _check_codes(codes, tables)
    row_nk = _row_numbers(codes, rows_per_table)
    factors_nk = weights.reshape(-1, num_tables).float() * scales.flatten()[row_nk]
    tokens = max(_GATHERED_ELEMENTS // (num_tables * out_features), 1)
    parts = [
        torch.bmm(factor_nk.unsqueeze(1), tables.flatten(0, 1)[row].float()).squeeze(1)
        for row, factor_nk in zip(row_nk.split(tokens), factors_nk.split(tokens), strict=True)
    ]
    return torch.cat(parts).view(*codes.shape[:-1], out_features).to(weights.dtype)
