"""The lookup's backward pass as Triton kernels, without atomics.

Tokens are grouped by code. A program owns a few rows of a table in a block of columns. It reads each
reader's dy once, adds weight * dy to the row's gradient in the order of tokens, and <dy, row> to d weights. Column
blocks are launched one after another: a block of all of dy stays in the L2 cache, the scratch is one float32 a
token, table and chunk of columns, and every sum has one order.

A row that very many tokens read is cut into segments of its readers: programs of their own add them up first, and the
row's program their parts, in order. Where segments begin follows from the codes alone.
"""

# Kernels are in Triton's language, whose types are not Python's.
# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .composition import Sum, add_to
from .triton_blocks import OPTIONS, backward_blocks, sum_type
from .triton_grouping import group_tokens
from .triton_sums import add_pairs

# Readers of a row that one program adds, while others add the rest: a row has 2 SEGMENT - 1 before it is cut.
SEGMENT = 512
FINISHED = 32  # tokens, and tables, whose weights' gradients a program writes


@triton.jit
def _add_readers(
    totals,
    dy_ptr,
    weights_ptr,
    tokens_ptr,
    tables_ptr,
    d_weights_ptr,
    begin,
    end,
    place,
    column,
    num_reads,
    out_features,
    chunk,
    width,
    add,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """To the totals, weight * dy of a row's readers begin to end - 1, in order; <dy, row> to their d weights.

    Columns are as in `_backward_kernel`, the row's begin at tables_ptr + place. Pointers but for dy's and the tables'
    are those of the row's table.
    """
    offset = tl.arange(0, BLOCK)
    values = ()
    for c in tl.static_range(CHUNKS):
        values += (tl.load(tables_ptr + place + c * chunk + offset, mask=offset < width, other=0).to(SUM),)
    for first in tl.range(begin, end, UNROLL):
        tokens = ()
        weights = ()
        gradients = ()
        sums = ()
        for step in tl.static_range(UNROLL):
            live = first + step < end
            token = tl.load(tokens_ptr + first + step, mask=live, other=0)
            tokens += (token,)
            weight = tl.load(weights_ptr + token, mask=live, other=0)
            weights += (weight.to(tables_ptr.dtype.element_ty).to(SUM),)
            for c in tl.static_range(CHUNKS):
                dy = dy_ptr + token.to(tl.int64) * out_features + column + c * chunk + offset
                gradients += (tl.load(dy, mask=offset < tl.where(live, width, 0), other=0),)
                sums += (tl.load(d_weights_ptr + c * num_reads + token, mask=live & add, other=0),)
        for step in tl.static_range(UNROLL):
            added = ()
            for c in tl.static_range(CHUNKS):
                gradient = gradients[step * CHUNKS + c].to(SUM)
                added += (totals[c] + weights[step] * gradient,)
                sum = sums[step * CHUNKS + c] + tl.sum(gradient * values[c], axis=0)
                tl.store(d_weights_ptr + c * num_reads + tokens[step], sum, mask=first + step < end)
            totals = added
    return totals


@triton.jit
def _no_totals(BLOCK: tl.constexpr, CHUNKS: tl.constexpr, SUM: tl.constexpr):
    totals = ()
    for _ in tl.static_range(CHUNKS):
        totals += (tl.zeros([BLOCK], SUM),)
    return totals


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "num_reads"])
def _segments_kernel(
    dy_ptr,
    weights_ptr,
    codes_ptr,
    tokens_ptr,
    ends_ptr,
    tables_ptr,
    parts_ptr,
    d_weights_ptr,
    num_tokens,
    num_slots,
    num_reads,
    out_features,
    chunk,
    all_chunks,
    add,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Of each segment of a row that is cut into several: its part [K, slots, O] of d tables, and readers' d weights.

    A row of n >= 2 SEGMENT readers has n / SEGMENT segments, rounded down, whose last takes the rest. Segment s of a
    row whose readers begin at place b is in slot b / SEGMENT + s, where no other row has one; and place
    (slot + 1) SEGMENT - 1 is in that row. So a slot's program finds its segment by itself.
    """
    num_reads = num_reads.to(tl.int64)  # chunks times reads may be more than 2^31
    slot = tl.program_id(0) % num_slots
    table = (tl.program_id(0) // num_slots).to(tl.int64)
    tokens_ptr += table * num_tokens
    weights_ptr += table * num_tokens
    d_weights_ptr += table * num_tokens
    ends_ptr += table * ROWS
    place = slot * SEGMENT + (SEGMENT - 1)
    taken = place < tl.load(ends_ptr + ROWS - 1)
    token = tl.load(tokens_ptr + place, mask=taken, other=0).to(tl.int64)
    code = tl.load(codes_ptr + token * K + table, mask=taken, other=0).to(tl.int64)
    begin = tl.load(ends_ptr + code - 1, mask=code > 0, other=0)
    readers = tl.load(ends_ptr + code) - begin
    segment = slot - begin // SEGMENT
    segments = tl.where(taken & (readers >= 2 * SEGMENT), readers // SEGMENT, 0)
    first = begin + segment * SEGMENT
    last = tl.where(segment == segments - 1, begin + readers, first + SEGMENT)
    offset = tl.arange(0, BLOCK)
    for first_chunk in tl.range(0, tl.where(segment < segments, all_chunks, 0), CHUNKS):
        for beside in tl.range(0, chunk, BLOCK):
            column = first_chunk * chunk + beside
            width = tl.minimum(chunk - beside, BLOCK)
            totals = _add_readers(
                _no_totals(BLOCK, CHUNKS, SUM),
                dy_ptr,
                weights_ptr,
                tokens_ptr,
                tables_ptr,
                d_weights_ptr + first_chunk * num_reads,
                first,
                last,
                (table * ROWS + code) * out_features + column,
                column,
                num_reads,
                out_features,
                chunk,
                width,
                add | (beside > 0),
                SUM,
                BLOCK,
                UNROLL,
                CHUNKS,
            )
            part_ptr = parts_ptr + (table * num_slots + slot) * out_features + column
            for c in tl.static_range(CHUNKS):
                tl.store(part_ptr + c * chunk + offset, totals[c], mask=offset < width)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "num_reads"])
def _backward_kernel(
    dy_ptr,
    weights_ptr,
    tokens_ptr,
    ends_ptr,
    tables_ptr,
    parts_ptr,
    d_tables_ptr,
    d_weights_ptr,
    num_tokens,
    num_slots,
    num_reads,
    out_features,
    first_column,
    chunk,
    width,
    add,
    add_tables,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS_PER_PROGRAM: tl.constexpr,
    SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Columns [0, width) from first_column on, and the same of the next CHUNKS - 1 chunks of columns: of d_tables, and
    each chunk's share of d_weights [CHUNKS, K, N]; weights too are [K, N]. A chunk's code is the same for any CHUNKS.

    Of a row that is cut into segments, whose readers have their d weights, the segments' parts are added in order.
    With add_tables d_tables holds what is added to; a row has one writer.
    """
    num_reads = num_reads.to(tl.int64)  # chunks times reads may be more than 2^31
    offset = tl.arange(0, BLOCK)
    for i in tl.range(ROWS_PER_PROGRAM):
        row = tl.program_id(0).to(tl.int64) * ROWS_PER_PROGRAM + i  # of all tables laid end to end
        of_table = row // ROWS * num_tokens
        begin = tl.load(ends_ptr + row - 1, mask=row % ROWS > 0, other=0)
        end = tl.load(ends_ptr + row)
        place = row * out_features + first_column
        totals = _no_totals(BLOCK, CHUNKS, SUM)
        if parts_ptr is not None:
            segments = tl.where(end - begin >= 2 * SEGMENT, (end - begin) // SEGMENT, 0)
            slot = row // ROWS * num_slots + begin // SEGMENT
            for segment in tl.range(0, segments):
                added = ()
                for c in tl.static_range(CHUNKS):
                    part = (slot + segment) * out_features + first_column + c * chunk + offset
                    added += (totals[c] + tl.load(parts_ptr + part, mask=offset < width, other=0),)
                totals = added
            end = tl.where(segments > 0, begin, end)
        totals = _add_readers(
            totals,
            dy_ptr,
            weights_ptr + of_table,
            tokens_ptr + of_table,
            tables_ptr,
            d_weights_ptr + of_table,
            begin,
            end,
            place,
            first_column,
            num_reads,
            out_features,
            chunk,
            width,
            add,
            SUM,
            BLOCK,
            UNROLL,
            CHUNKS,
        )
        for c in tl.static_range(CHUNKS):
            place_ptr = d_tables_ptr + place + c * chunk + offset
            total = totals[c] + tl.load(place_ptr, mask=(offset < width) & add_tables, other=0)
            tl.store(place_ptr, total.to(d_tables_ptr.dtype.element_ty), mask=offset < width)


@triton.jit(do_not_specialize=["num_tokens"])
def _finish_kernel(
    sums_ptr,
    codes_ptr,
    d_weights_ptr,
    num_tokens,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d_weights [N, K]: sums [CHUNKS, K, N] added by neighbouring pairs, NaN where the code is wrong."""
    tables = tl.cdiv(K, BLOCK)
    token = (tl.program_id(0) // tables).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    table = tl.program_id(0) % tables * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (token < num_tokens) & (table < K)
    parts = ()
    for c in tl.static_range(CHUNKS):
        place = (c * K + table) * num_tokens.to(tl.int64) + token
        parts += (tl.load(sums_ptr + place, mask=inside, other=0),)
    code = tl.load(codes_ptr + token * K + table, mask=inside, other=0)
    in_range = (code >= 0) & (code.to(tl.int64) < ROWS)
    total = tl.where(in_range, add_pairs(parts, CHUNKS), float("nan"))
    tl.store(d_weights_ptr + token * K + table, total, mask=inside)


def lookup_backward(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    chunks: int = 1,
    sums: Sequence[Sum] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """d weights [..., K] float32 (float64), summed over the table sets, and d tables of each, from every dy [..., O_i].

    With `sums`, contiguous, d tables are added there in float32, without a rounding, and none are returned.

    d weights is summed over `chunks` equal chunks of columns, of all sets together, and then over pairs of chunks. The
    same bits in every run. A token with a code outside [0, 2**tau) gets a NaN there and is in no row.
    """
    num_tables, rows, _ = tables[0].shape
    num_tokens = codes.numel() // num_tables
    sum_dtype = torch.promote_types(tables[0].dtype, torch.float32)
    d_weights = weights.new_empty(weights.shape, dtype=sum_dtype)
    if num_tokens == 0:
        d_tables = [one.new_zeros(one.shape) for one in tables]
        return d_weights, d_tables if sums is None else add_to(sums, d_tables)
    d_tables = [] if sums is not None else [one.new_empty(one.shape) for one in tables]
    places = [(one, False) for one in d_tables] if sums is None else sums
    slots = num_tokens // SEGMENT
    with torch.cuda.device_of(codes):
        codes = codes.contiguous()
        tokens_kn, ends_kr = group_tokens(codes.view(num_tokens, num_tables), rows)
        weights_kn = weights.reshape(num_tokens, num_tables).t().contiguous()
        sums_ckn = weights_kn.new_empty((chunks, *weights_kn.shape), dtype=sum_dtype)
        add = False
        for dy, one, (d_one, holds) in zip(dys, tables, places, strict=True):
            out_features = one.shape[-1]
            chunk = out_features // chunks
            block, beside, unroll, rows_per_program = backward_blocks(
                num_tokens, rows, out_features, chunks, one.element_size()
            )
            one = one.contiguous()
            dy = dy.contiguous()
            constants = {
                **{"ROWS": rows, "SEGMENT": SEGMENT, "SUM": sum_type(one)},
                **{"BLOCK": block, "UNROLL": unroll, "CHUNKS": beside, **OPTIONS},
            }
            parts = None
            if slots >= 2:
                parts = one.new_empty((num_tables, slots, out_features), dtype=sum_dtype)
                _segments_kernel[(num_tables * slots,)](
                    dy,
                    weights_kn,
                    codes,
                    tokens_kn,
                    ends_kr,
                    one,
                    parts,
                    sums_ckn,
                    num_tokens,
                    slots,
                    weights_kn.numel(),
                    out_features,
                    chunk,
                    chunks,
                    add,
                    K=num_tables,
                    **constants,
                )
            for first_chunk, first in itertools.product(range(0, chunks, beside), range(0, chunk, block)):
                _backward_kernel[(num_tables * rows // rows_per_program,)](
                    dy,
                    weights_kn,
                    tokens_kn,
                    ends_kr,
                    one,
                    parts,
                    d_one,
                    sums_ckn[first_chunk:],
                    num_tokens,
                    slots,
                    weights_kn.numel(),
                    out_features,
                    first_chunk * chunk + first,
                    chunk,
                    min(block, chunk - first),
                    add or first > 0,
                    holds,
                    ROWS_PER_PROGRAM=rows_per_program,
                    **constants,
                )
            add = True
        grid = (triton.cdiv(num_tokens, FINISHED) * triton.cdiv(num_tables, FINISHED),)
        _finish_kernel[grid](
            sums_ckn, codes, d_weights, num_tokens, num_tables, rows, chunks, FINISHED, enable_fp_fusion=False
        )
    return d_weights, d_tables
