"""The Triton kernels against float64, in Triton's interpreter on the CPU or compiled on a GPU.

`test_triton` runs this file in a process of its own with TRITON_INTERPRET=1, which has to be set before triton is
imported; tests/gpu/test_kernels.py has the same tests on a GPU.
"""

import math
import os

import pytest
import torch
from torch import Tensor

from mf_train.kernels import (
    reference,
    triton_blocks,
    triton_grouping,
    triton_lookup_backward,
    triton_norm,
    triton_sums,
)
from mf_train.kernels import triton_backend as backend
from mf_train.kernels.composition import code_dtype
from mf_train.model import norm_steps
from mf_train.model.sums import pairwise_sum
from tests.closeness import TOLERANCE, assert_close
from tests.kernels import norm_checks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    from tests.kernels import quick_interpreter  # noqa: F401
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs the compiled kernels on a GPU")
# What takes seconds in the interpreter and goes much the same way as another case; the drills run it.
SLOW = [pytest.mark.slow] if INTERPRETED else []

SCORES = ["probability", "scaled_probability"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, device=DEVICE)


def random_lookup(
    seed: int, tau: int, num_tables: int, widths: tuple[int, ...], lead: tuple[int, ...], dtype=torch.float32
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """codes (their borders among them), weights, tables and dys."""
    g = generator(seed)
    codes = torch.randint(0, 2**tau, (*lead, num_tables), generator=g, device=DEVICE)
    if codes.numel():
        codes.view(-1, num_tables)[0], codes.view(-1, num_tables)[-1] = 0, 2**tau - 1
    weights = torch.rand(*lead, num_tables, generator=g, device=DEVICE).to(dtype)
    tables = [normal(g, num_tables, 2**tau, width).to(dtype) for width in widths]
    dys = [normal(g, *lead, width).to(dtype) for width in widths]
    return codes.to(code_dtype(tau)), weights, tables, dys


def run(
    codes: Tensor, weights: Tensor, tables: list[Tensor], dys: list[Tensor], chunks: int = 1
) -> list[Tensor]:
    """Every y, d weights in their type, every d tables."""
    d_weights, d_tables = backend.lookup_backward(dys, codes, weights, tables, chunks)
    return [*backend.lookup(codes, weights, tables), d_weights.to(weights.dtype), *d_tables]


def run_reference(codes: Tensor, weights: Tensor, tables: list[Tensor], dys: list[Tensor]) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in (weights, *tables)]
    ys = [reference.lookup(codes, leaves[0], table) for table in leaves[1:]]
    gradients = torch.autograd.grad(ys, leaves, [dy.double() for dy in dys])
    return [*(y.detach() for y in ys), *gradients]


@pytest.fixture
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small inputs choose small blocks; here also what large ones choose."""
    if request.param != "as chosen":
        monkeypatch.setattr(triton_blocks, "MIN_PROGRAMS", 1)
    if request.param == "narrow blocks":
        monkeypatch.setattr(triton_blocks, "L2_BYTES", 1)
    return request.param


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tau", [1, 3, 8, 10, 12, 16])
def test_hash(tau: int, dtype: torch.dtype, score: str) -> None:
    g = generator(tau)
    num_tables = 1 + tau % 7
    temperature = 0.5 + float(torch.rand((), generator=g, device=DEVICE))
    x = normal(g, 3, 19, num_tables * tau).to(dtype)
    d_weights = normal(g, 3, 19, num_tables).to(dtype)
    codes, weights = backend.hash_codes(x, num_tables, temperature, score)
    dx = backend.hash_codes_backward(d_weights, x, num_tables, temperature, score)

    leaf = x.double().requires_grad_()
    true_codes, true_weights = reference.hash_codes(leaf, num_tables, temperature, score)
    (true_dx,) = torch.autograd.grad(true_weights, leaf, d_weights.double())
    assert codes.dtype == true_codes.dtype and weights.dtype == dx.dtype == dtype
    assert torch.equal(codes, true_codes)
    assert_close(weights, true_weights.detach(), dtype)
    assert_close(dx, true_dx, dtype)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hash_of_zeros_nan_and_infinities(dtype: torch.dtype, score: str) -> None:
    inf, nan = math.inf, math.nan
    special = [[0.0, -0.0, -1.0], [1.0, nan, 1.0], [-nan, nan, nan], [inf, 1.0, -2.0], [-inf, inf, inf]]
    x = torch.tensor([*special, [1e-38, -1e-38, 1e4], [1.0, 2.0, -3.0]], device=DEVICE).flatten().to(dtype)
    codes, weights = backend.hash_codes(x, 7, 0.8, score)
    dx = backend.hash_codes_backward(torch.ones_like(weights), x, 7, 0.8, score)

    leaf = x.double().requires_grad_()
    true_codes, true_weights = reference.hash_codes(leaf, 7, 0.8, score)
    (true_dx,) = torch.autograd.grad(true_weights.sum(), leaf)
    assert torch.equal(codes, true_codes)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(weights.double(), true_weights, rtol=tolerance, atol=0, equal_nan=True)
    torch.testing.assert_close(dx.double(), true_dx, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("tau", [1, 6, 8, 10])
def test_a_chunk_has_the_same_bits_in_any_company(tau: int) -> None:
    x = normal(generator(tau), 9, 16 * tau)
    codes, weights = backend.hash_codes(x, 16, 1.0, "probability")
    for part in range(4):
        columns = slice(4 * part, 4 * part + 4)
        # The last rows start at an odd multiple of tau: other alignments, as well as other blocks.
        piece = x[1:, 4 * tau * part : 4 * tau * (part + 1)]
        part_codes, part_weights = backend.hash_codes(piece, 4, 1.0, "probability")
        assert torch.equal(part_codes, codes[1:, columns])
        assert torch.equal(part_weights, weights[1:, columns])


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_every_leading_shape(lead: tuple[int, ...]) -> None:
    x = normal(generator(0), *lead, 12)
    codes, weights = backend.hash_codes(x, 4, 1.0, "probability")
    assert codes.shape == weights.shape == (*lead, 4)
    assert backend.hash_codes_backward(weights, x, 4, 1.0, "probability").shape == x.shape

    arguments = random_lookup(1, 3, 4, (6, 3), lead)
    for actual, expected in zip(run(*arguments), run_reference(*arguments), strict=True):
        assert_close(actual, expected, torch.float32)


# tau, K, the tables' widths, leading shape. The interpreter takes a millisecond for each read of each row.
PLAIN, THREE_SETS, WIDE, ALL_BITS = (
    (1, 5, (7,), (2, 9)),
    (2, 9, (40, 1, 3), (5,)),
    (2, 2, (200,), (30,)),
    (8, 1, (33,), (11,)),
)


@pytest.mark.parametrize(
    ("case", "dtype", "blocks"),
    [
        *((PLAIN, dtype, "as chosen") for dtype in (torch.float16, torch.float64)),
        *((case, torch.bfloat16, "as chosen") for case in (THREE_SETS, ALL_BITS)),
        (WIDE, torch.float32, "narrow blocks"),
        *(pytest.param(PLAIN, dtype, "as chosen", marks=SLOW) for dtype in (torch.float32, torch.bfloat16)),
        pytest.param(WIDE, torch.bfloat16, "as chosen", marks=SLOW),
        pytest.param(WIDE, torch.float32, "one wide block", marks=SLOW),
        pytest.param(THREE_SETS, torch.float32, "as chosen", marks=SLOW),
        pytest.param(THREE_SETS, torch.float32, "one wide block", marks=SLOW),
    ],
    indirect=["blocks"],
    ids=str,
)
def test_lookup(case: tuple, dtype: torch.dtype, blocks: str) -> None:
    codes, weights, tables, dys = random_lookup(0, *case, dtype)
    actual = run(codes, weights, tables, dys)
    for a, e in zip(actual, run_reference(codes, weights, tables, dys), strict=True):
        assert a.dtype == dtype
        assert_close(a, e, dtype)
    if not INTERPRETED:  # which runs one program after the other
        again = run(codes, weights, tables, dys)
        assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_biases_are_added_before_the_sum_is_rounded(dtype: torch.dtype) -> None:
    codes, weights, tables, _ = random_lookup(19, 3, 4, (11, 6), (7,), dtype)
    wide = [normal(generator(20), 2 * one.shape[-1]).to(dtype) for one in tables]
    biases = [one[::2] for one in wide]  # not contiguous
    ys = backend.lookup(codes, weights, tables, biases)
    for y, table, bias in zip(ys, tables, biases, strict=True):
        exact = reference.lookup(codes, weights.double(), table.double(), bias.double())
        assert y.dtype == dtype
        assert_close(y, exact, dtype)
        # the interpreter rounds otherwise to bfloat16
        if dtype == torch.float16 or (dtype == torch.bfloat16 and not INTERPRETED):
            assert (y.double() - exact).norm() <= 1.1 * (exact.to(dtype).double() - exact).norm()


def test_lookup_in_many_rows() -> None:
    arguments = random_lookup(10, 10, 1, (9,), (6,), torch.bfloat16)
    for actual, expected in zip(run(*arguments), run_reference(*arguments), strict=True):
        assert_close(actual, expected, torch.bfloat16)
    codes, weights, tables, _ = random_lookup(12, 12, 3, (9,), (6,))
    y = backend.lookup(codes, weights, tables)[0]
    assert_close(y, reference.lookup(codes, weights.double(), tables[0].double()), torch.float32)


def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, weights, tables, _ = random_lookup(2, 4, 9, (80,), (13,))
    chosen = backend.lookup(codes, weights, tables)[0]
    one_by_one = torch.stack([backend.lookup(codes[n], weights[n], tables)[0] for n in range(3)])
    assert torch.equal(one_by_one, chosen[:3])
    for programs, l2_bytes in ((1, 2**24), (1, 1)):
        monkeypatch.setattr(triton_blocks, "MIN_PROGRAMS", programs)
        monkeypatch.setattr(triton_blocks, "L2_BYTES", l2_bytes)
        assert torch.equal(backend.lookup(codes, weights, tables)[0], chosen)


@pytest.mark.parametrize(("width", "degree"), [(8, 2), pytest.param(72, 4, marks=SLOW)])
def test_columns_give_the_same_bits_as_the_whole(width: int, degree: int) -> None:
    codes, weights, tables, dys = random_lookup(3, 1, 9, (width,), (4,))
    y, _, d_tables = run(codes, weights, tables, dys)
    for first in range(0, width, width // degree):
        columns = slice(first, first + width // degree)
        # Not contiguous, either.
        part, _, d_part = run(codes, weights, [tables[0][..., columns]], [dys[0][..., columns]])
        assert torch.equal(part, y[..., columns])
        assert torch.equal(d_part, d_tables[..., columns])


@pytest.mark.parametrize(
    ("widths", "dtype", "blocks"),
    [
        ((8, 24), torch.bfloat16, "narrow blocks"),
        pytest.param((40, 40, 40), torch.float32, "as chosen", marks=SLOW),
        pytest.param((1040,), torch.bfloat16, "as chosen", marks=SLOW),
    ],
    indirect=["blocks"],
    ids=str,
)
def test_slices_of_columns_give_nodes_of_the_gradient_of_weights(
    widths: tuple[int, ...], dtype: torch.dtype, blocks: str
) -> None:
    codes, weights, tables, dys = random_lookup(4, 1, 3, widths, (3,), dtype)
    whole, d_tables = backend.lookup_backward(dys, codes, weights, tables, 8)
    assert whole.dtype == torch.float32
    assert_close(whole, run_reference(codes, weights, tables, dys)[len(widths)], torch.float32)
    for ranks in (2, 8):
        nodes = []
        for rank in range(ranks):
            part_dys, part_tables = ([t.chunk(ranks, -1)[rank] for t in each] for each in (dys, tables))
            node, parts = backend.lookup_backward(part_dys, codes, weights, part_tables, 8 // ranks)
            nodes.append(node)
            for part, d_table in zip(parts, d_tables, strict=True):
                assert torch.equal(part, d_table.chunk(ranks, -1)[rank])
        assert torch.equal(pairwise_sum(torch.stack(nodes, -1)), whole)


@pytest.mark.parametrize(
    "codes_dtype",
    [torch.uint8, torch.int64, *(pytest.param(t, marks=SLOW) for t in (torch.int16, torch.int32))],
    ids=str,
)
def test_codes_out_of_range_give_nan_and_read_nothing(codes_dtype: torch.dtype) -> None:
    codes, weights, tables, dys = random_lookup(4, 3, 3, (10,), (12,))
    codes = codes.to(codes_dtype)
    good = run(codes, weights, tables, dys)
    assert not any(t.isnan().any() for t in good)
    wrong = codes.clone()
    wrong[2, 1] = 8
    wrong[5, 0] = 255 if codes_dtype == torch.uint8 else torch.iinfo(codes_dtype).min
    wrong[7, 2] = torch.iinfo(codes_dtype).max
    y, d_weights, d_tables = run(wrong, weights, tables, dys)
    rows = torch.tensor([2, 5, 7], device=DEVICE)
    assert torch.equal(y.isnan().any(-1).nonzero().flatten(), rows) and y[rows].isnan().all()
    others = torch.tensor([n for n in range(12) if n not in (2, 5, 7)], device=DEVICE)
    assert torch.equal(y[others], good[0][others])
    assert torch.equal(d_weights.isnan(), (wrong < 0) | (wrong.long() >= 8))
    # In the tables' gradient, as if those tokens had not read there.
    silent = torch.where(d_weights.isnan(), 0, weights)
    silent_codes = torch.where(d_weights.isnan(), 0, wrong)
    expected = run_reference(silent_codes, silent, tables, dys)[2]
    assert_close(d_tables, expected, torch.float32)


def test_nan_and_infinity_reach_their_readers_only() -> None:
    codes, weights, tables, dys = random_lookup(5, 2, 3, (5,), (16,))
    tables[0][1, 2, 3] = math.nan
    tables[0][2, 1, 0] = math.inf
    dys[0][3, 4] = math.nan
    for actual, expected in zip(
        run(codes, weights, tables, dys), run_reference(codes, weights, tables, dys), strict=True
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_all_tokens_in_one_row() -> None:
    codes, weights, tables, dys = random_lookup(6, 2, 1, (5,), (300,))
    codes[:, 0] = 3
    actual = run(codes, weights, tables, dys)
    for a, e in zip(actual, run_reference(codes, weights, tables, dys), strict=True):
        assert_close(a, e, torch.float32)
    assert not actual[2][0, :3].any()  # rows that nobody reads


@pytest.mark.parametrize(
    ("widths", "dtype", "chunks", "blocks"),
    [
        pytest.param((260,), torch.float32, 2, "narrow blocks", marks=SLOW),  # two of each chunk
        ((8, 4), torch.bfloat16, 4, "narrow blocks"),
        pytest.param((80,), torch.float64, 2, "as chosen", marks=SLOW),
        pytest.param((200, 40), torch.float16, 8, "narrow blocks", marks=SLOW),
    ],
    indirect=["blocks"],
    ids=str,
)
def test_rows_of_many_readers_are_cut(
    widths: tuple[int, ...],
    dtype: torch.dtype,
    chunks: int,
    blocks: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of a table's reads, or all of them, are of one row; and some of none."""
    codes, weights, tables, dys = random_lookup(16, 2, 2, widths, (27,), dtype)
    codes[5:18, 0], codes[:, 1] = 1, 3
    whole = run(codes, weights, tables, dys, chunks)
    monkeypatch.setattr(triton_lookup_backward, "SEGMENT", 4)
    cut = run(codes, weights, tables, dys, chunks)
    for actual, expected in zip(cut, run_reference(codes, weights, tables, dys), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, dtype)
    first = len(widths) + 1  # of the tables' gradients
    for one, other in zip(cut[:first], whole[:first], strict=True):
        assert torch.equal(one, other)
    if dtype == torch.float32:  # in which another order of the sum shows
        assert not torch.equal(cut[first], whole[first])

    wrong = codes.clone()
    wrong[3:27:6] = 200
    d_weights, d_tables = backend.lookup_backward(dys, wrong, weights, tables, chunks)
    silent = torch.where(wrong == 200, 0, weights)
    expected = run_reference(torch.where(wrong == 200, 0, wrong), silent, tables, dys)
    assert torch.equal(d_weights.isnan(), wrong == 200)
    assert_close(d_weights[wrong != 200], expected[len(widths)][wrong != 200], torch.float32)
    for actual, right in zip(d_tables, expected[first:], strict=True):
        assert_close(actual, right, dtype)
    for part in range(2):
        columns = [[each.chunk(2, -1)[part] for each in given] for given in (tables, dys)]
        _, slices = backend.lookup_backward(columns[1], wrong, weights, columns[0])
        for one, other in zip(slices, d_tables, strict=True):
            assert torch.equal(one, other.chunk(2, -1)[part])


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)], ids=str)
def test_gradients_are_added_in_float32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To what sums hold, or in the place of whatever lies there; also of rows that are cut, and of no token at all."""
    monkeypatch.setattr(triton_lookup_backward, "SEGMENT", 4)
    codes, weights, tables, dys = random_lookup(17, 1, 2, (6, 3), (13,), dtype)
    held = [normal(generator(18), *tables[0].shape), torch.full(tables[1].shape, math.nan, device=DEVICE)]
    sums = [(held[0].clone(), True), (held[1].clone(), False)]
    d_weights, none = backend.lookup_backward(dys, codes, weights, tables, 1, sums)
    assert none == []
    assert torch.equal(d_weights, backend.lookup_backward(dys, codes, weights, tables)[0])
    gradients = run_reference(codes, weights, tables, dys)[3:]
    assert_close(sums[0][0], held[0].double() + gradients[0], torch.float32)
    assert_close(sums[1][0], gradients[1], torch.float32)

    before = sums[0][0].clone()
    backend.lookup_backward([dy[:0] for dy in dys], codes[:0], weights[:0], tables, 1, sums)
    assert torch.equal(sums[0][0], before) and not sums[1][0].any()


@pytest.mark.parametrize(
    ("table_dtype", "weight_dtype"),
    [
        *((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)),
        *(pytest.param(dtype, dtype, marks=SLOW) for dtype in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_weights_are_rounded_to_the_tables_dtype(table_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    codes, weights, tables, dys = random_lookup(7, 2, 3, (10,), (9,))
    weights = weights.bfloat16().to(weight_dtype)  # so that truncation and rounding agree
    tables, dys = [tables[0].to(table_dtype)], [dys[0].to(table_dtype)]
    mixed = run(codes, weights, tables, dys)
    same = run(codes, weights.to(table_dtype), tables, dys)
    assert [t.dtype for t in mixed] == [table_dtype, weight_dtype, table_dtype]
    assert torch.equal(mixed[0], same[0]) and torch.equal(mixed[2], same[2])
    assert_close(mixed[1], same[1], torch.bfloat16)


def test_strided_arguments() -> None:
    codes, weights, tables, dys = random_lookup(8, 2, 6, (10,), (8,))
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (codes, weights, tables[0], dys[0])]
    assert not any(t.is_contiguous() for t in strided)
    actual = run(strided[0], strided[1], [strided[2]], [strided[3]])
    for a, e in zip(actual, run(codes, weights, tables, dys), strict=True):
        assert torch.equal(a, e)
    summed = run(codes, weights, tables, [torch.ones((), device=DEVICE).expand(8, 10)])
    assert_close(
        summed[2], run_reference(codes, weights, tables, [torch.ones_like(dys[0])])[2], torch.float32
    )

    x = normal(generator(9), 24, 5).t()
    d_weights = normal(generator(10), 4, 5).t()
    for score in SCORES:
        actual = backend.hash_codes_backward(d_weights, x, 4, 1.0, score)
        assert torch.equal(
            actual, backend.hash_codes_backward(d_weights.contiguous(), x.contiguous(), 4, 1.0, score)
        )
        assert torch.equal(
            backend.hash_codes(x, 4, 1.0, score)[1], backend.hash_codes(x.contiguous(), 4, 1.0, score)[1]
        )


@pytest.mark.parametrize(
    ("lead", "dtype", "blocks"),
    [
        *((lead, torch.float32, "as chosen") for lead in [(), (0,), (1,), (2, 13)]),
        *(((2, 13), torch.bfloat16, blocks) for blocks in ("as chosen", "one wide block")),
    ],
    indirect=["blocks"],
    ids=str,
)
def test_int8(lead: tuple[int, ...], dtype: torch.dtype, blocks: str) -> None:
    g = generator(11)
    codes, weights, _, _ = random_lookup(12, 5, 9, (), lead, dtype)
    tables = torch.randint(-128, 128, (9, 32, 37), generator=g, device=DEVICE, dtype=torch.int8)
    scales = torch.rand(9, 32, generator=g, device=DEVICE)
    y = backend.lookup_int8(codes, weights, tables, scales)
    exact = reference.lookup(codes, weights.double(), tables.double() * scales.double().unsqueeze(-1))
    assert y.dtype == dtype
    assert_close(y, exact, dtype)


@pytest.mark.parametrize(
    ("tau", "num_tokens"),
    [(1, 1), (1, 700), (4, 63), (4, 64), (4, 128), (4, 129), (9, 1), (9, 600), (12, 300)],
)
def test_grouping_is_a_stable_sort(tau: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens of several chunks, whose counts are added up in several steps."""
    monkeypatch.setattr(triton_grouping, "CHUNK", 128)
    monkeypatch.setattr(triton_grouping, "SCANNED", 2 * 2**tau)
    codes = torch.randint(-1, 2**tau + 1, (num_tokens, 3), generator=generator(tau), device=DEVICE).short()
    counted = triton_grouping.group_tokens(codes, 2**tau)
    monkeypatch.setattr(triton_grouping, "MAX_COUNTED_ROWS", 0)
    by_sorting = triton_grouping.group_tokens(codes, 2**tau)
    for tokens, ends in (counted, by_sorting):
        assert tokens.dtype == ends.dtype == torch.int32
        for k in range(3):
            column = codes[:, k].tolist()
            expected = sorted((code, n) for n, code in enumerate(column) if 0 <= code < 2**tau)
            assert tokens[k, : len(expected)].tolist() == [n for _, n in expected]
            assert ends[k].tolist() == [sum(code <= row for code, _ in expected) for row in range(2**tau)]


@pytest.mark.parametrize(("tau", "num_tokens"), [(1, 1), (4, 300), (9, 130), (12, 40)])
def test_counting(tau: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a slice of the tables, on top of earlier counts; codes out of range are no row's."""
    monkeypatch.setattr(triton_grouping, "CHUNK", 128)
    codes = torch.randint(-1, 2**tau + 1, (num_tokens, 7), generator=generator(tau), device=DEVICE).short()
    counts = torch.full((3, 2**tau), 2**40, device=DEVICE)
    triton_grouping.count_codes(codes[:, 2:5], counts)
    for k in range(3):
        right = codes[:, 2 + k][(codes[:, 2 + k] >= 0) & (codes[:, 2 + k] < 2**tau)].long()
        assert torch.equal(counts[k] - 2**40, right.bincount(minlength=2**tau))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (1, 65), (2, 1), (64, 70), (3, 27, 9), (4100, 5)], ids=str)
def test_column_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(generator(len(shape)), *shape).to(dtype)
    sums = triton_sums.column_sums(x)
    assert sums.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(sums, x.double().flatten(0, -2).sum(0), sums.dtype)
    part = slice(shape[-1] // 3, shape[-1] // 2 + 1)
    assert torch.equal(triton_sums.column_sums(x[..., part]), sums[part])


# Features, leading shape, type, with a bias, numbers of ranks: one chunk to eight, a tile of one token, of several
# programs, and of no token. The interpreter takes a millisecond for each operation on a tile.
NORMS = [
    (1, (3,), torch.float32, True, (1,)),
    (5, (2, 3), torch.float32, False, (1,)),
    (2501, (2,), torch.float32, True, (1,)),
    (18, (1,), torch.bfloat16, True, (2,)),
    (36, (), torch.float16, False, (1, 2, 4)),
    (192, (70,), torch.float32, True, (2,)),
    (40, (2, 3), torch.bfloat16, False, (1, 2, 4, 8)),
    (1280, (9,), torch.bfloat16, True, (8,)),
    (24, (0,), torch.float32, True, (1, 8)),
    (24, (2, 0), torch.bfloat16, False, (2,)),
]


@pytest.mark.parametrize("case", NORMS, ids=str)
def test_norm(case: tuple[int, tuple[int, ...], torch.dtype, bool, tuple[int, ...]]) -> None:
    *sizes, ranks = case
    given = norm_checks.random_arguments(case[0], *sizes, DEVICE)
    whole = norm_checks.run(triton_norm, given)
    norm_checks.check_against_float64(whole, given)
    for number in ranks:
        norm_checks.check_ranks(triton_norm, given, number, whole)


@pytest.mark.parametrize("centred", [True, False], ids=["layernorm", "rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norm_is_that_of_torch_operations(dtype: torch.dtype, centred: bool) -> None:
    """In float32 to the bit in the interpreter, which rounds otherwise to bfloat16."""
    x, dy, weight, bias = norm_checks.random_arguments(2, 40, (3, 20), dtype, centred, DEVICE)
    moments = torch.stack([norm_steps.moments(part, 5, centred=centred) for part in x.chunk(2, -1)])
    x, dy, weight = (t[..., :20] for t in (x, dy, weight))
    bias = None if bias is None else bias[:20]
    results = []
    for steps in (triton_norm, norm_steps):
        y, mean, rstd = steps.normalise(x, moments, weight, bias, 5, 1e-5)
        sums = norm_steps.gradient_sums(dy, x, mean, rstd, weight, 5)
        gathered = torch.stack((sums, sums.flip(0)))
        results.append(
            [y, mean, rstd, *steps.gradients(dy, x, mean, rstd, weight, gathered, 5, centred=centred)]
        )
    for actual, expected in zip(*results, strict=True):
        if expected is not None:
            assert actual.dtype == expected.dtype
            assert_close(actual, expected, TOLERANCE[dtype])
    if INTERPRETED and dtype == torch.float32:
        for place in (0, 1, 2, 3):  # y, mean, rstd, dx
            assert torch.equal(results[0][place], results[1][place])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_norm_of_what_is_not_finite(value: float) -> None:
    """As torch operations: the token's numbers are NaN, and the gradients of the affine map, and no other token's."""
    given = norm_checks.random_arguments(3, 40, (21,), torch.float32, True, DEVICE)
    given.x[2, 39] = value
    for actual, expected in zip(
        norm_checks.run(triton_norm, given), norm_checks.run(norm_steps, given), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(
        norm_checks.run(triton_norm, given)[0].isnan().any(-1), given.x.isfinite().logical_not().any(-1)
    )


def test_norm_of_strided_arguments() -> None:
    given = norm_checks.random_arguments(4, 24, (10,), torch.float32, True, DEVICE)
    strided = norm_checks.Arguments(
        given.x.t().contiguous().t(),
        torch.ones((), device=DEVICE).expand(given.dy.shape),
        given.weight.repeat_interleave(2)[::2],
        given.bias,
    )
    assert not any(t.is_contiguous() for t in strided[:3])
    plain = given._replace(dy=torch.ones_like(given.dy))
    for actual, expected in zip(
        norm_checks.run(triton_norm, strided), norm_checks.run(triton_norm, plain), strict=True
    ):
        assert torch.equal(actual, expected)


@compiled_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_round_once(dtype: torch.dtype) -> None:
    arguments = random_lookup(13, 1, 64, (48,), (2048,), dtype)
    for actual, exact in zip(run(*arguments), run_reference(*arguments), strict=True):
        rounding = (exact.to(dtype).double() - exact).norm()
        assert (actual.double() - exact).norm() <= 1.1 * rounding


@compiled_only
def test_more_than_two_to_the_31_elements() -> None:
    codes, weights, _, _ = random_lookup(14, 16, 2, (), (32,), torch.bfloat16)
    tables = torch.zeros(2, 2**16, 16640, device=DEVICE, dtype=torch.bfloat16)
    assert tables.numel() > 2**31
    tables[1, -1] = 1
    codes[:, 1] = 2**16 - 1
    (y,) = backend.lookup(codes, weights, [tables])
    assert torch.equal(y, weights[:, 1:].expand_as(y))
    _, (d_tables,) = backend.lookup_backward([torch.ones_like(y)], codes, weights, [tables])
    assert_close(d_tables[1, -1], weights[:, 1].double().sum().expand(16640), torch.bfloat16)


@compiled_only
def test_norm_of_more_than_two_to_the_31_elements() -> None:
    features, tokens = 1024, 2**21 + 3
    given = norm_checks.random_arguments(5, features, (7,), torch.bfloat16, True, DEVICE)
    expected = norm_checks.run(triton_norm, given)
    x = torch.zeros(tokens, features, device=DEVICE, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-7:] = given.x
    y, mean, rstd = triton_norm.normalise(x, None, given.weight, given.bias, 128, norm_checks.EPSILON)
    for actual, one in zip((y, mean, rstd), expected, strict=False):
        assert torch.equal(actual[-7:], one)
    del y
    dy = torch.zeros_like(x)
    dy[-7:] = given.dy
    dx, *_ = triton_norm.gradients(dy, x, mean, rstd, given.weight, None, 128, centred=True)
    assert torch.equal(dx[-7:], expected[3]) and not dx[:-7].any()


@compiled_only
def test_cuda_graph() -> None:
    codes, weights, tables, dys = random_lookup(15, 8, 16, (96, 40), (1000,), torch.bfloat16)
    run(codes, weights, tables, dys)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(codes, weights, tables, dys)
    new = random_lookup(16, 8, 16, (96, 40), (1000,), torch.bfloat16)
    for old, fresh in zip((codes, weights, *tables, *dys), (new[0], new[1], *new[2], *new[3]), strict=True):
        old.copy_(fresh)
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(captured, run(*new), strict=True))


@compiled_only
def test_norm_in_a_cuda_graph() -> None:
    given, new = (
        norm_checks.random_arguments(seed, 512, (100,), torch.bfloat16, True, DEVICE) for seed in (6, 7)
    )
    norm_checks.run(triton_norm, given)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = norm_checks.run(triton_norm, given)
    for old, fresh in zip(given, new, strict=True):
        old.copy_(fresh)
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(captured, norm_checks.run(triton_norm, new), strict=True))
