"""Hash: codes, weights and gradients of every backend against brute force and float64."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from mf_train.kernels import composition, cpu, hash_codes, ops, reference
from tests.closeness import TOLERANCE, assert_close
from tests.pairs import in_pairs

SCORES = ["probability", "scaled_probability"]
# Those that run here; what needs a GPU has tests of its own.
BACKENDS = ["composition", *(["cpu"] if cpu.library() is not None else [])]


def run(backend: str):
    """`hash_codes` by one backend, or as a converted model has it, differentiated by autograd."""
    return composition.hash_codes if backend == "plain" else functools.partial(hash_codes, backend=backend)


def hash_with_gradient(function, x: Tensor, d_weights: Tensor, *arguments, **options):
    x = x.clone().requires_grad_()
    codes, weights = function(x, *arguments, **options)
    (dx,) = torch.autograd.grad(weights, x, d_weights.to(weights.dtype))
    return codes, weights.detach(), dx


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tau", [1, 2, 3, 5, 8])
def test_reference_is_the_softmax_over_all_sign_patterns(tau: int, score: str) -> None:
    generator = torch.Generator().manual_seed(tau)
    num_tables, temperature = 3, 0.7
    x = torch.randn(4, num_tables * tau, generator=generator, dtype=torch.float64, requires_grad=True)
    z = x.view(4, num_tables, tau)
    # Pattern c has +1 where bit i of c is set; rows are in the order of the codes.
    patterns = torch.tensor([bits[::-1] for bits in itertools.product([-1.0, 1.0], repeat=tau)])
    probabilities = torch.softmax(z @ patterns.double().T / temperature, dim=-1)
    expected_weights, expected_codes = probabilities.max(-1)
    if score == "scaled_probability":
        expected_weights = expected_weights * z.abs().sum(-1)
    codes, weights = reference.hash_codes(x, num_tables, temperature, score)

    assert torch.equal(codes.long(), expected_codes)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=0)
    d_weights = torch.randn(weights.shape, generator=generator, dtype=torch.float64)
    (dx,) = torch.autograd.grad(weights, x, d_weights, retain_graph=True)
    (expected_dx,) = torch.autograd.grad(expected_weights, x, d_weights)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("tau", "dtype", "score", "backend"),
    in_pairs([*range(1, 13), 15, 16], list(TOLERANCE), SCORES, [*BACKENDS, "plain"]),
)
def test_hash_equals_the_reference(tau: int, dtype: torch.dtype, score: str, backend: str) -> None:
    if backend == "cpu" and dtype not in (torch.float32, torch.bfloat16):
        backend = "auto"
    generator = torch.Generator().manual_seed(100 + tau)
    num_tables = int(torch.randint(1, 12, (), generator=generator))
    temperature = float(torch.rand((), generator=generator)) + 0.5
    x = torch.randn(2, 7, num_tables * tau, generator=generator).to(dtype)
    d_weights = torch.randn(2, 7, num_tables, generator=generator).to(dtype)
    codes, weights, dx = hash_with_gradient(run(backend), x, d_weights, num_tables, temperature, score)
    # From the same rounded numbers, in float64 throughout.
    true_codes, true_weights, true_dx = hash_with_gradient(
        reference.hash_codes, x.double(), d_weights, num_tables, temperature, score
    )

    assert codes.dtype == {True: torch.uint8, tau in range(9, 16): torch.int16, tau == 16: torch.int32}[True]
    assert codes.shape == weights.shape == (2, 7, num_tables)
    assert weights.dtype == dx.dtype == dtype
    assert torch.equal(codes, true_codes)
    assert_close(weights, true_weights, TOLERANCE[dtype])
    assert_close(dx, true_dx, TOLERANCE[dtype])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", ["composition", "reference"])
def test_gradcheck(backend: str, score: str) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(3, 15, generator=generator, dtype=torch.float64)
    x = (x + 0.1 * x.sign()).requires_grad_()  # finite differences must not cross zero
    assert torch.autograd.gradcheck(lambda x: hash_codes(x, 3, 1.3, score, backend=backend)[1], x)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("backend", [*BACKENDS, "plain", "reference"])
def test_both_zeros_count_as_positive(backend: str, score: str) -> None:
    x = torch.tensor([0.0, -0.0, -1.0, 0.0])
    codes, weights, dx = hash_with_gradient(run(backend), x, torch.ones(1), 1, 1.0, score)
    hit = 1 / (1 + math.exp(-2))
    probability = hit / 8
    assert codes.tolist() == [0b1011]
    assert weights.item() == pytest.approx(probability)
    # probability: dp/d|z| = p * 2 * (1 - sigmoid(2|z|)); the scaled weight p * |z_2| adds p for every i.
    expected = torch.tensor([1.0, 1.0, -2 * (1 - hit), 1.0]) * probability
    if score == "scaled_probability":
        expected = expected + probability * torch.tensor([1.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_gives_bit_zero_and_a_nan_weight_in_its_chunk_only(backend: str) -> None:
    x = torch.tensor([1.0, math.nan, 1.0, 1.0, math.inf, -math.inf])
    codes, weights = hash_codes(x, 3, backend=backend)
    assert codes.tolist() == [0b01, 0b11, 0b01]
    assert torch.isnan(weights).tolist() == [True, False, False]
    assert weights[2] == 1


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0, 3), (2, 1, 3)], ids=str)
def test_every_leading_shape(lead: tuple[int, ...], backend: str) -> None:
    x = torch.randn(*lead, 12, generator=torch.Generator().manual_seed(1), requires_grad=True)
    codes, weights = hash_codes(x, 4, backend=backend)
    weights.sum().backward()
    assert codes.shape == weights.shape == (*lead, 4)
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_input_and_strided_gradient(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(24, 5, generator=generator).t()
    d_weights = torch.randn(4, 5, generator=generator).t()
    actual = hash_with_gradient(run(backend), x, d_weights, 4)
    expected = hash_with_gradient(run(backend), x.contiguous(), d_weights.contiguous(), 4)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tau", [1, 3, 6, 8, 10, 12, 16])
def test_a_chunk_has_the_same_bits_in_any_company(tau: int, score: str, backend: str) -> None:
    """Tensor parallelism hashes K / P chunks a rank; generation hashes one token at a time."""
    hash_codes = run(backend)
    x = torch.randn(33, 16 * tau, generator=torch.Generator().manual_seed(tau))
    codes, weights = hash_codes(x, 16, score=score)
    for degree in (2, 4, 8, 16):
        parts = [hash_codes(part, 16 // degree, score=score) for part in x.chunk(degree, dim=-1)]
        assert torch.equal(codes, torch.cat([part[0] for part in parts], dim=-1))
        assert torch.equal(weights, torch.cat([part[1] for part in parts], dim=-1))
    one_by_one = [hash_codes(row, 16, score=score) for row in x]
    assert torch.equal(codes, torch.stack([row[0] for row in one_by_one]))
    assert torch.equal(weights, torch.stack([row[1] for row in one_by_one]))
    assert torch.equal(weights[0, :1], hash_codes(x[0, :tau], 1, score=score)[1])


def test_training_keeps_x_alone() -> None:
    x = torch.randn(64, 80, dtype=torch.bfloat16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        hash_codes(x, 8)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


@pytest.mark.parametrize(
    ("dtype", "score", "backend"), in_pairs([torch.float32, torch.bfloat16], SCORES, BACKENDS), ids=str
)
def test_opcheck(dtype: torch.dtype, score: str, backend: str) -> None:
    for shape, num_tables in (((5, 20), 2), ((3, 12), 4), ((12,), 1), ((0, 12), 3)):
        x = torch.randn(shape, dtype=dtype)
        torch.library.opcheck(ops.hash_codes, (x.requires_grad_(), num_tables, 0.8, score, backend))
        d_weights = torch.randn(*shape[:-1], num_tables, dtype=dtype)
        arguments = (d_weights, x.detach(), num_tables, 0.8, score, backend)
        torch.library.opcheck(ops.hash_codes_backward, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 10), 3), r"multiple of num_tables = 3.*\(2, 10\)"),
        ((torch.randn(()), 1), r"multiple of num_tables = 1.*\(\)"),
        ((torch.randn(2, 34), 2), r"34 features for num_tables = 2, so 17 bits"),
        ((torch.randn(2, 0), 2), r"0 features for num_tables = 2, so 0 bits"),
        ((torch.randn(2, 8), 0), r"num_tables must be at least 1, got 0"),
        ((torch.ones(2, 8, dtype=torch.int64), 2), r"x must be float32.*int64"),
        ((torch.randn(2, 8), 2, 0.0), r"temperature must be a positive number, got 0.0"),
        ((torch.randn(2, 8), 2, math.nan), r"temperature must be a positive number, got nan"),
        ((torch.randn(2, 8), 2, 1.0, "scaled"), r"score must be one of .*scaled_probability, got 'scaled'"),
    ],
)
def test_errors_name_the_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_codes(*arguments)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("fast", "backend must be one of auto, composition, cpu, triton, cuda, reference, got 'fast'"),
        (
            "triton",
            "backend 'triton' cannot be used: it computes on GPUs, and the tensors are on cpu; "
            "leave the choice to backend='auto'",
        ),
    ],
)
def test_a_backend_that_cannot_run(backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hash_codes(torch.randn(2, 8), 2, backend=backend)
