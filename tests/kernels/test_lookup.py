"""Lookup: outputs and gradients against float64; column slices, determinism, memory, swapped storage."""

import ast
import functools
import runpy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mf_train.kernels import composition, cpu, hash_codes, lookup, lookup_all, lookup_int8, ops, reference
from tests.closeness import TOLERANCE, assert_close
from tests.pairs import in_pairs
from tests.threads import threads


def random_arguments(
    seed: int, tau: int, num_tables: int, out_features: int, lead: tuple[int, ...], dtype=torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**tau, (*lead, num_tables), generator=generator)
    weights = torch.rand(*lead, num_tables, generator=generator).to(dtype)
    tables = torch.randn(num_tables, 2**tau, out_features, generator=generator).to(dtype)
    return codes.to(composition.code_dtype(tau)), weights, tables


# Those that run here; what needs a GPU has tests of its own.
BACKENDS = ["composition", *(["cpu"] if cpu.library() is not None else [])]


def plain_lookup(codes: Tensor, weights: Tensor, tables: Tensor, bias: Tensor | None = None) -> Tensor:
    """The composition as a converted model has it: differentiated by autograd."""
    (y,) = composition.lookup(codes, weights, [tables])
    return y if bias is None else y + bias


def run(backend: str):
    """`lookup` by one backend, or the converted model's."""
    return plain_lookup if backend == "plain" else functools.partial(lookup, backend=backend)


def lookup_with_gradients(function, codes, weights, tables, dy, bias=None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (weights, tables)]
    if bias is not None:
        leaves.append(bias.clone().requires_grad_())
    y = function(codes, *leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def thread_number(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads(request.param):
        yield request.param


def test_reference_is_the_sum_over_tables() -> None:
    codes, weights, tables = random_arguments(0, 3, 5, 7, (4,), torch.float64)
    bias = torch.arange(7, dtype=torch.float64)
    dy = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, d_weights, d_tables, d_bias = lookup_with_gradients(reference.lookup, codes, weights, tables, dy, bias)
    expected_d_tables = torch.zeros_like(tables)
    for n in range(4):
        expected = bias.clone()
        for k in range(5):
            row = tables[k, codes[n, k].item()]
            expected += weights[n, k] * row
            expected_d_tables[k, codes[n, k].item()] += weights[n, k] * dy[n]
            torch.testing.assert_close(d_weights[n, k], dy[n] @ row)
        torch.testing.assert_close(y[n], expected)
    torch.testing.assert_close(d_tables, expected_d_tables)
    torch.testing.assert_close(d_bias, dy.sum(0))


@pytest.mark.parametrize(
    ("tau", "dtype", "backend"), in_pairs(range(1, 13), list(TOLERANCE), [*BACKENDS, "plain"])
)
def test_lookup_equals_the_reference(tau: int, dtype: torch.dtype, backend: str) -> None:
    if backend == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        backend = "auto"  # which is the composition then
    generator = torch.Generator().manual_seed(tau)
    num_tables = int(torch.randint(1, 8, (), generator=generator)) * 2 - 1
    out_features = int(torch.randint(1, 40, (), generator=generator)) * 2 - 1
    lead = (2, int(torch.randint(1, 60, (), generator=generator)))
    codes, weights, tables = random_arguments(tau, tau, num_tables, out_features, lead, dtype)
    bias = torch.randn(out_features, generator=generator).to(dtype)
    dy = torch.randn(*lead, out_features, generator=generator).to(dtype)
    actual = lookup_with_gradients(run(backend), codes, weights, tables, dy, bias)
    # From the same rounded numbers, in float64 throughout.
    expected = lookup_with_gradients(
        reference.lookup, codes, weights.double(), tables.double(), dy.double(), bias.double()
    )
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e, TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["auto", "composition"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_round_once(dtype: torch.dtype, backend: str) -> None:
    """Sums in float32: an error of the size of one rounding, though 1 024 tokens meet in each row."""
    lookup = run(backend)
    codes, weights, tables = random_arguments(3, 1, 64, 48, (2048,), dtype)
    dy = torch.randn(2048, 48, generator=torch.Generator().manual_seed(4)).to(dtype)
    actual = lookup_with_gradients(lookup, codes, weights, tables, dy)
    exact = lookup_with_gradients(reference.lookup, codes, weights.double(), tables.double(), dy.double())
    for a, e in zip(actual, exact, strict=True):
        rounding = (e.to(dtype).double() - e).norm()
        assert (a.double() - e).norm() <= 1.1 * rounding


@pytest.mark.parametrize(
    ("backend", "table_dtype", "weight_dtype"),
    [
        (backend, table_dtype, weight_dtype)
        for backend in BACKENDS
        for table_dtype in (torch.float32, torch.bfloat16, torch.float64)
        for weight_dtype in (torch.float32, torch.bfloat16, torch.float64)
        if backend == "composition" or torch.float64 not in (table_dtype, weight_dtype)
    ],
    ids=str,
)
def test_weights_are_rounded_to_the_tables_dtype(
    backend: str, table_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(5, 4, 6, 10, (9,))
    weights, tables = weights.to(weight_dtype), tables.to(table_dtype)
    dy = torch.randn(9, 10, generator=torch.Generator().manual_seed(6)).to(table_dtype)
    mixed = lookup_with_gradients(lookup, codes, weights, tables, dy)
    same = lookup_with_gradients(lookup, codes, weights.to(table_dtype), tables, dy)
    assert [t.dtype for t in mixed] == [table_dtype, weight_dtype, table_dtype]
    assert torch.equal(mixed[0], same[0])
    # the weights' gradient is rounded once, to the weights' own dtype
    narrow = min(table_dtype, weight_dtype, key=lambda dtype: dtype.itemsize)
    assert torch.equal(mixed[1].to(narrow), same[1].to(narrow))
    assert torch.equal(mixed[2], same[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_code_type_gives_the_same(code_dtype: torch.dtype, backend: str) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(8, 6, 5, 12, (11,))
    assert torch.equal(lookup(codes.to(code_dtype), weights, tables), lookup(codes, weights, tables))


@pytest.mark.parametrize("backend", ["composition", "reference"])
def test_gradcheck(backend: str) -> None:
    codes, weights, tables = random_arguments(9, 2, 3, 5, (4,), torch.float64)
    bias = torch.randn(5, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in (weights, tables, bias))
    assert torch.autograd.gradcheck(lambda *leaves: lookup(codes, *leaves, backend=backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_features", [8, 16, 24, 40, 64, 80, 96, 192, 520])
def test_columns_give_the_same_bits_as_the_whole(out_features: int, thread_number: int, backend: str) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(out_features, 6, 33, out_features, (65,))
    y = lookup(codes, weights, tables)
    for degree in (2, 4, 8):
        width = out_features // degree
        for first in range(0, out_features, width):
            columns = slice(first, first + width)
            part = lookup(codes, weights, tables[..., columns].contiguous())
            assert torch.equal(part, y[..., columns]), (degree, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_of_tokens_and_threads_changes_no_bit(thread_number: int, backend: str) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(11, 8, 24, 72, (130,))
    y = lookup(codes, weights, tables)
    one_by_one = torch.stack([lookup(codes[n], weights[n], tables) for n in range(130)])
    assert torch.equal(y, one_by_one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_same_bits_in_every_run(dtype: torch.dtype, backend: str) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(12, 5, 16, 48, (2000,), dtype)
    dy = torch.randn(2000, 48, generator=torch.Generator().manual_seed(13)).to(dtype)
    runs = []
    for number in (1, 2, 2, 2):
        with threads(number):
            runs.append(lookup_with_gradients(lookup, codes, weights, tables, dy))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("backend", ["auto", "composition", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_every_leading_shape(lead: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    codes, weights, tables = random_arguments(14, 3, 4, 6, lead, dtype)
    bias = torch.ones(6, dtype=dtype)
    weights.requires_grad_()
    tables.requires_grad_()
    y = lookup(codes, weights, tables, bias, backend=backend)
    y.sum().backward()  # an expanded gradient, too
    assert y.shape == (*lead, 6)
    assert weights.grad is not None and weights.grad.shape == weights.shape
    assert tables.grad is not None and tables.grad.shape == tables.shape
    if y.numel() == 0:
        assert not tables.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_arguments(backend: str) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(15, 4, 6, 10, (8,))
    dy = torch.randn(10, 8, generator=torch.Generator().manual_seed(16)).t()
    strided = [t.transpose(0, -1).contiguous().transpose(0, -1) for t in (codes, weights, tables)]
    assert not any(t.is_contiguous() for t in strided)
    actual = lookup_with_gradients(lookup, *strided, dy)
    expected = lookup_with_gradients(lookup, codes, weights, tables, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_keeps_codes_weights_and_the_tables_themselves(backend: str) -> None:
    lookup = run(backend)
    codes, weights, tables = random_arguments(17, 8, 16, 64, (512,), torch.bfloat16)
    weights.requires_grad_()
    tables.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        lookup(codes, weights, tables)
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (codes, weights, tables))
    assert sum(t.nbytes for t in kept) == codes.nbytes + weights.nbytes + tables.nbytes


@pytest.mark.parametrize("with_hash", [False, True], ids=["lookup", "hash and lookup"])
def test_storage_of_tables_may_go_and_come_back(with_hash: bool) -> None:
    """As under ZeRO stage 3: the parameter is empty between the passes, and elsewhere in memory after."""
    codes, weights, tables = random_arguments(18, 4, 6, 10, (32,))
    dy = torch.randn(32, 10, generator=torch.Generator().manual_seed(19))
    x = torch.randn(32, 24, generator=torch.Generator().manual_seed(20), requires_grad=True)
    weights.requires_grad_()

    def gradients(swap: bool) -> tuple[Tensor, ...]:
        parameter = torch.nn.Parameter(tables.clone())
        source = x if with_hash else weights
        y = lookup(*(hash_codes(x, 6) if with_hash else (codes, weights)), parameter)
        if swap:
            held = parameter.data.clone()
            parameter.data.fill_(float("nan"))  # whoever kept the old memory reads NaN
            parameter.data = torch.empty(0)
            parameter.data = held
        return torch.autograd.grad(y, (source, parameter), dy)

    for swapped, kept in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(swapped, kept)


@pytest.mark.parametrize(
    ("dtype", "backend", "has_biases"),
    in_pairs([torch.float32, torch.bfloat16], BACKENDS, [False, True]),
    ids=str,
)
def test_opcheck(dtype: torch.dtype, backend: str, has_biases: bool) -> None:
    for tau, num_tables, out_features, lead in (
        (3, 4, 6, (5,)),
        (9, 2, 3, (2, 3)),
        (2, 1, 1, ()),
        (2, 3, 4, (0,)),
    ):
        codes, weights, tables = random_arguments(21, tau, num_tables, out_features, lead, dtype)
        others = torch.randn(num_tables, 2**tau, out_features + 3).to(dtype)
        dys = [torch.randn(*lead, size).to(dtype) for size in (out_features, out_features + 3)]
        biases = [torch.randn(dy.shape[-1]).to(dtype) for dy in dys]
        torch.library.opcheck(
            ops.lookup_backward,
            (dys, codes, weights, [tables, others], torch.float32, has_biases, 1, backend),
        )
        leaves = (
            codes,
            weights.clone().requires_grad_(),
            [one.clone().requires_grad_() for one in (tables, others)],
            [bias.clone().requires_grad_() for bias in biases] if has_biases else [],
            1,
            backend,
        )
        torch.library.opcheck(ops.lookup, leaves)


class KeptSum:
    """Gradients of a parameter, and how often one was begun and done."""

    def __init__(self, parameter: Tensor) -> None:
        self.total = torch.full(parameter.shape, torch.nan)
        self.begun = self.finished = 0

    def begin(self) -> tuple[Tensor, bool]:
        self.begun += 1
        return self.total, self.begun > 1

    def done(self) -> None:
        self.finished += 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tables_gradients_go_to_their_sums(dtype: torch.dtype, backend: str) -> None:
    codes, weights, tables = random_arguments(22, 3, 4, 6, (9,), dtype)
    sets = [nn.Parameter(tables), nn.Parameter(tables.flip(0)[..., :5])]
    biases = [nn.Parameter(one[0, 0].clone()) for one in sets]
    weights.requires_grad_()
    expected = [torch.zeros(one.shape, dtype=torch.float64) for one in sets]
    for micro_batch in range(2):
        dys = [torch.randn(9, size, generator=torch.Generator().manual_seed(micro_batch)) for size in (6, 5)]
        dys = [dy.to(dtype) for dy in dys]
        ys = lookup_all(codes, weights, sets, biases, backend=backend)
        plain = torch.autograd.grad(ys, [weights, *biases, *sets], dys)
        if not micro_batch:
            kept = [KeptSum(one) for one in sets]
        for one, each in zip(sets, kept, strict=True):
            one.gradient_sum = each
        torch.autograd.backward(lookup_all(codes, weights, sets, biases, backend=backend), dys)
        for leaf, gradient in zip([weights, *biases], plain, strict=False):
            assert torch.equal(leaf.grad, gradient)
            leaf.grad = None
        for each, gradient in zip(expected, plain[3:], strict=True):
            each += gradient.double()
        assert all(one.grad is None for one in sets)
        assert all(each.begun == each.finished == micro_batch + 1 for each in kept)
        del sets[0].gradient_sum  # of one set alone: none is used
        ys = lookup_all(codes, weights, sets, biases, backend=backend)
        assert torch.autograd.grad(ys, sets[0], dys)[0].equal(plain[3])
    for each, right in zip(kept, expected, strict=True):
        assert_close(each.total, right, dtype)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_whole(dtype: torch.dtype, dynamic: bool) -> None:
    def layer(x: Tensor, tables: Tensor, bias: Tensor) -> Tensor:
        codes, weights = hash_codes(x, 5, 0.9, "scaled_probability")
        return lookup(codes, weights, tables, bias)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (3, 8):
        generator = torch.Generator().manual_seed(n)
        shapes = ((n, 2, 20), (5, 16, 12), (12,), (n, 2, 12))
        *leaves, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        for leaf in leaves:
            leaf.requires_grad_()
        results = []
        for function in (layer, compiled):
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CODES, WEIGHTS, TABLES = torch.zeros(5, 4, dtype=torch.uint8), torch.rand(5, 4), torch.randn(4, 8, 6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CODES[:, :3], WEIGHTS, TABLES), r"codes \(5, 3\), weights \(5, 4\), tables \(4, 8, 6\)"),
        ((CODES[:, :3], WEIGHTS[:, :3], TABLES), r"codes \(5, 3\), weights \(5, 3\), tables \(4, 8, 6\)"),
        ((CODES[0, 0], WEIGHTS[0, 0], TABLES), r"codes \(\), weights \(\), tables"),
        ((CODES, WEIGHTS, TABLES[0]), r"tables must be \[K, 2\*\*tau, O\].*got \(8, 6\)"),
        ((CODES, WEIGHTS, TABLES[:, :7]), r"tables must have 2\*\*tau rows.*got \(4, 7, 6\)"),
        ((CODES, WEIGHTS, TABLES[..., :0]), r"tables must be .*got \(4, 8, 0\)"),
        ((CODES.float(), WEIGHTS, TABLES), r"codes must be uint8, int16, int32 or int64, got torch.float32"),
        ((CODES, WEIGHTS, torch.randn(4, 1024, 6)), r"codes of torch.uint8 cannot name 1024 rows"),
        ((CODES, CODES, TABLES), r"weights must be float32.*got torch.uint8"),
        ((CODES, WEIGHTS, TABLES.long()), r"tables must be float32.*got torch.int64"),
        ((CODES, WEIGHTS, TABLES, torch.zeros(5)), r"bias must be \[6\].*got \(5,\)"),
        ((CODES, WEIGHTS, TABLES, torch.zeros(6).double()), r"bias must be .*float32.*got .*float64"),
        ((CODES.to("meta"), WEIGHTS, TABLES), r"codes is on meta, but tables is on cpu"),
        ((CODES, WEIGHTS, TABLES, torch.zeros(6, device="meta")), r"bias is on meta, but tables is on cpu"),
        ((CODES, WEIGHTS, TABLES[:, :4], torch.zeros(7)), r"bias must be \[6\].*got \(7,\)"),
        (
            (CODES + 8, WEIGHTS, TABLES),
            r"codes must be in \[0, 8\) for tables of shape \(4, 8, 6\), got .* 8 to 8",
        ),
        ((CODES.short() - 1, WEIGHTS, TABLES), r"codes must be in \[0, 8\) .*got codes from -1 to -1"),
        (
            (CODES.long() + 2**40, WEIGHTS, TABLES),
            r"codes must be in \[0, 8\) .*got codes from 1099511627776 to",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_argument(arguments: tuple, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        lookup(*arguments, backend=backend)


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        (
            "fast",
            torch.float32,
            "backend must be one of auto, composition, cpu, triton, cuda, reference, got 'fast'",
        ),
        (
            "triton",
            torch.float32,
            "backend 'triton' cannot be used: it computes on GPUs, and the tensors are on cpu",
        ),
        (
            "cuda",
            torch.float32,
            "backend 'cuda' cannot be used: it computes on GPUs, and the tensors are on cpu",
        ),
        ("cpu", torch.float16, "backend 'cpu' cannot be used: it does not compute in torch.float16"),
    ],
)
def test_a_backend_that_cannot_run(backend: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lookup(CODES, WEIGHTS, TABLES.to(dtype), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_sets_are_several_lookups(dtype: torch.dtype, backend: str) -> None:
    codes, weights, first = random_arguments(24, 5, 7, 20, (3, 50), dtype)
    tables = [
        first,
        *(random_arguments(seed, 5, 7, size, (), dtype)[2] for seed, size in ((25, 33), (26, 20))),
    ]
    generator = torch.Generator().manual_seed(27)
    biases = [None, *(torch.randn(size, generator=generator).to(dtype) for size in (33, 20))]
    dys = [torch.randn(3, 50, t.shape[-1], generator=generator).to(dtype) for t in tables]
    leaves = [t.clone().requires_grad_() for t in (weights, *tables)]
    results = lookup_all(codes, leaves[0], leaves[1:], biases, backend=backend)
    d_weights, *d_tables = torch.autograd.grad(results, leaves, dys)
    total = torch.zeros(weights.shape, dtype=torch.float64)
    for i, (y, table, bias, dy) in enumerate(zip(results, tables, biases, dys, strict=True)):
        alone, _, d_table = lookup_with_gradients(run(backend), codes, weights, table, dy)
        assert torch.equal(y, alone if bias is None else alone + bias)
        assert torch.equal(d_tables[i], d_table)
        exact = lookup_with_gradients(reference.lookup, codes, weights.double(), table.double(), dy.double())
        total += exact[1]
    assert_close(d_weights, total, TOLERANCE[dtype])

    leaves[0].grad = None
    lookup_all(codes, *(leaves[0], leaves[1:]), backend=backend)[
        1
    ].sum().backward()  # the others have no gradient
    assert leaves[0].grad is not None and leaves[2].grad is not None
    assert not any(leaf.grad.any() for leaf in (leaves[1], leaves[3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tau", "lead"), [(3, (40,)), (8, (1,)), (10, (2, 3)), (4, (0,)), (2, ())])
def test_int8_tables(tau: int, lead: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tau)
    codes, weights, _ = random_arguments(tau, tau, 9, 21, lead, dtype)
    tables = torch.randint(-128, 128, (9, 2**tau, 21), generator=generator, dtype=torch.int8)
    scales = torch.rand(9, 2**tau, generator=generator)
    bias = torch.randn(21, generator=generator).to(dtype)
    function = composition.lookup_int8 if backend == "composition" else cpu.lookup_int8
    exact = reference.lookup(codes, weights.double(), tables.double() * scales.double().unsqueeze(-1))
    assert_close(function(codes, weights, tables, scales), exact, TOLERANCE[dtype])
    y = lookup_int8(codes, weights, tables, scales, bias)
    assert y.dtype == dtype
    assert_close(y, exact + bias.double(), 2 * TOLERANCE[dtype])
    with pytest.raises(ValueError, match=r"scales must be float32 \[K, 2\*\*tau\]"):
        lookup_int8(codes, weights, tables, scales.T)
    with pytest.raises(ValueError, match=r"tables must be int8, got torch\.float32"):
        lookup_int8(codes, weights, tables.float(), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_weights_through_int8_tables(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(31)
    codes, weights, _ = random_arguments(31, 5, 9, 21, (2, 17), dtype)
    tables = torch.randint(-128, 128, (9, 32, 21), generator=generator, dtype=torch.int8)
    scales = torch.rand(9, 32, generator=generator)
    dy = torch.randn(2, 17, 21, generator=generator).to(dtype)
    leaf, wide = weights.clone().requires_grad_(), weights.double().requires_grad_()
    exact = reference.lookup(codes, wide, tables.double() * scales.double().unsqueeze(-1))
    y = lookup_int8(codes, leaf, tables, scales)
    y.backward(dy)
    exact.backward(dy.double())
    assert_close(y.detach(), exact.detach(), TOLERANCE[dtype])
    assert_close(leaf.grad, wide.grad, TOLERANCE[dtype])
    with torch.no_grad():
        assert not lookup_int8(codes, leaf, tables, scales).requires_grad


def test_composition_works_alone_in_a_converted_model() -> None:
    path = composition.__file__
    with open(path) as file:
        nodes = list(ast.walk(ast.parse(file.read())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} == {"collections", "torch"}

    alone = runpy.run_path(path)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(22))
    codes, weights = alone["hash_codes"](x, 4)
    assert torch.equal(weights, hash_codes(x, 4, backend="composition")[1])
    tables = torch.randn(4, 64, 10, generator=torch.Generator().manual_seed(23))
    assert torch.equal(
        alone["lookup"](codes, weights, [tables])[0], lookup(codes, weights, tables, backend="composition")
    )
