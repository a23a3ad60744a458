"""What C++ gets: buffers of other dtypes, sizes, devices and layouts are refused; torch's defaults do not matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mf_train.kernels import cpu, cpu_loss, cpu_norm
from mf_train.kernels.buffers import address
from tests.kernels import test_decode as decoder

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"no C++ operation: {cpu.reason()}")

N, K, TAU, O, D = 6, 3, 4, 8, 12  # noqa: E741 - the paper's names


def operations() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Every operation with arguments that it takes; sequences of tensors count as one."""
    generator = torch.Generator("cpu").manual_seed(1)

    def floats(*shape: int) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu")
        return drawn.normal_(generator=generator)

    def integers(high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.empty(shape, dtype=torch.int64, device="cpu")
        return drawn.random_(0, high, generator=generator).to(dtype)

    read = {"codes": integers(2**TAU, N, K, dtype=torch.uint8), "weights": floats(N, K)}
    tables = [floats(K, 2**TAU, O) for _ in range(2)]
    x = {"x": floats(N, D)}
    statistics = {"mean": floats(N), "rstd": floats(N)}
    backward = {"dy": floats(N, D), **x, **statistics, "weight": floats(D)}
    int8 = {"tables": integers(99, K, 2**TAU, O, dtype=torch.int8), "scales": floats(K, 2**TAU)}
    normaliser = {"normaliser": floats(N), "factor": floats(N), "target": integers(D, N, dtype=torch.int64)}
    settings = {"num_tables": K, "temperature": 1.0, "score": "probability"}
    return {
        "hash": (cpu.hash_codes, {**x, **settings}),
        "hash backward": (cpu.hash_codes_backward, {"d_weights": floats(N, K), **x, **settings}),
        "lookup": (cpu.lookup, {**read, "tables": tables}),
        "lookup backward": (
            cpu.lookup_backward,
            {"dys": [floats(N, O), floats(N, O)], **read, "tables": tables},
        ),
        "int8": (cpu.lookup_int8, {**read, **int8}),
        "sums": (cpu.column_sums, x),
        "moments": (cpu_norm.moments, {**x, "chunk": 3, "centred": True}),
        "normalise": (
            cpu_norm.normalise,
            {
                **x,
                "sums": floats(2, N, 2).abs(),
                "weight": floats(D),
                "bias": floats(D),
                "chunk": 3,
                "epsilon": 1e-5,
            },
        ),
        "norm sums": (cpu_norm.gradient_sums, {**backward, "chunk": 3}),
        "norm backward": (
            cpu_norm.gradients,
            {**backward, "sums": floats(2, N, 2), "chunk": 3, "centred": True},
        ),
        "loss sums": (cpu_loss.sums, {"logits": floats(N, D), "target": normaliser["target"], "chunk": 3}),
        "loss backward": (cpu_loss.gradient, {"logits": floats(N, D), **normaliser}),
    }


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "dtype": lambda t: t.to(torch.float16 if t.is_floating_point() else torch.int32),
    "device": lambda t: t.to("meta"),
    "rows": lambda t: t[1:],
    "columns": lambda t: torch.cat((t, t[..., :1]), -1),
}
# What makes another call that is right: gradients are cast, codes have any of four types, and where nothing else has
# the size that changes, it is another size.
RIGHT = {
    ("codes", "dtype"),
    ("dy", "dtype"),
    ("dys", "dtype"),
    ("d_weights", "dtype"),
    *(("lookup", "tables", "columns"), ("int8", "tables", "columns"), ("loss backward", "logits", "columns")),
    *((name, "x", kind) for name in ("sums", "moments") for kind in ("rows", "columns")),
    *(
        ("hash", "x", "rows"),
        ("normalise", "sums", "rows"),
        ("norm backward", "sums", "rows"),
    ),  # of fewer ranks
}


@pytest.mark.parametrize("kind", SPOILT)
@pytest.mark.parametrize("name", operations())
def test_a_buffer_that_does_not_fit_is_refused(name: str, kind: str) -> None:
    function, arguments = operations()[name]
    function(**arguments)
    for key, value in arguments.items():
        if {(key, kind), (name, key, kind)} & RIGHT:
            continue
        if isinstance(value, Tensor):
            wrongs = [SPOILT[kind](value)]
        elif isinstance(value, list):
            wrongs = [[SPOILT[kind](value[0]), value[1]], [value[0], SPOILT[kind](value[1])]]
        else:
            continue
        for wrong in wrongs:
            with pytest.raises(ValueError):
                function(**arguments | {key: wrong})


@pytest.mark.parametrize("chunk", [1, 5, 7, 24])
def test_rows_of_more_chunks_than_there_is_room_for_are_refused(chunk: int) -> None:
    x, row = torch.randn(N, D), torch.randn(N)
    for call in (
        lambda: cpu_norm.moments(x, chunk, centred=True),
        lambda: cpu_norm.gradient_sums(x, x, row, row, x[0], chunk),
        lambda: cpu_norm.normalise(x, None, x[0], None, chunk, 1e-5),
        lambda: cpu_norm.gradients(x, x, row, row, x[0], None, chunk, centred=True),
        lambda: cpu_loss.sums(x, row.long(), chunk),
        lambda: cpu.lookup_backward([x], *(torch.zeros(N, K, dtype=torch.uint8), x[:, :K]), [x[:K, None]], 5),
    ):
        with pytest.raises(ValueError, match="1, 2, 4 or 8 equal chunks"):
            call()


@pytest.mark.parametrize(
    "wrong",
    [
        {"counts": torch.zeros(K, 2**TAU, dtype=torch.int32)},
        {"counts": torch.zeros(K - 1, 2**TAU, dtype=torch.int64)},
        {"counts": torch.zeros(2**TAU, K, dtype=torch.int64).t()},
        {"codes_nk": torch.zeros(K, N, dtype=torch.uint8).t()},
        {"codes_nk": torch.zeros(N, K, dtype=torch.uint8, device="meta")},
        {"codes_nk": torch.zeros(N, K)},
    ],
)
def test_counts_that_do_not_fit_are_refused(wrong: dict[str, Tensor]) -> None:
    right = {
        "codes_nk": torch.zeros(N, K, dtype=torch.uint8),
        "counts": torch.zeros(K, 2**TAU, dtype=torch.int64),
    }
    cpu.count_codes(**right)
    assert right["counts"].sum() == N * K
    with pytest.raises(ValueError):
        cpu.count_codes(**right | wrong)


def test_a_negated_view_is_no_buffer() -> None:
    negated = torch.complex(torch.ones(3), torch.ones(3)).conj().imag
    assert negated.is_neg()
    with pytest.raises(ValueError, match="x must be"):
        address("x", torch._neg_view(torch.ones(3)), torch.float32, (3,))


def flat(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [each for part in results for each in flat(part)]


@pytest.fixture
def other_defaults() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", operations())
def test_torchs_defaults_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    function, arguments = operations()[name]
    expected = flat(function(**arguments))
    request.getfixturevalue("other_defaults")
    for found, result in zip(flat(function(**arguments)), expected, strict=True):
        assert found.dtype == result.dtype and found.is_cpu and torch.equal(found, result)


def test_torchs_defaults_change_no_step_of_the_decoder(request: pytest.FixtureRequest) -> None:
    arguments, steps = decoder.step_arguments(), decoder.Decoder(decoder.model())
    expected = steps.step(**arguments)
    request.getfixturevalue("other_defaults")
    assert torch.equal(steps.step(**arguments), expected)
