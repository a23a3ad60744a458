"""The C++ operation: against float64 over random shapes, bit-equality, bad codes, its build, sanitizers."""

import copy
import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mf_train.kernels import build, composition, cpu, reference
from mf_train.model.sums import pairwise_sum
from tests.closeness import assert_close
from tests.examples import examples
from tests.threads import threads

needs_library = pytest.mark.skipif(cpu.library() is None, reason=cpu.reason())
SCORES = ["probability", "scaled_probability"]
# Relative to the largest entry: a few roundings of the dtype.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
REPOSITORY = Path(__file__).resolve().parents[2]


def assert_same_bits(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))  # NaN and -0.0 included


class Case:
    """Random codes (rows 0 and the last among them), weights, table sets and dy."""

    def __init__(
        self, seed: int, tau: int, num_tables: int, columns: list[int], tokens: int, dtype=torch.float32
    ):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2**tau, (tokens, num_tables), generator=generator)
        border = torch.rand(codes.shape, generator=generator)
        codes[border < 0.2] = 0
        codes[border > 0.8] = 2**tau - 1
        self.codes = codes.to(torch.uint8 if tau <= 8 else torch.int16 if tau <= 15 else torch.int32)
        self.weights = torch.rand(codes.shape, generator=generator).to(dtype)
        self.tables = [torch.randn(num_tables, 2**tau, o, generator=generator).to(dtype) for o in columns]
        self.dys = [torch.randn(tokens, o, generator=generator).to(dtype) for o in columns]

    def run(self, chunks: int = 1) -> list[Tensor]:
        """y of every set, d weights in their type, d tables of every set."""
        ys = cpu.lookup(self.codes, self.weights, self.tables)
        d_weights, d_tables = cpu.lookup_backward(self.dys, self.codes, self.weights, self.tables, chunks)
        return [*ys, d_weights.to(self.weights.dtype), *d_tables]

    def slice(self, rank: int, ranks: int) -> "Case":
        """The same with one of `ranks` equal slices of every set's columns."""
        part = copy.copy(self)
        part.tables = [t.chunk(ranks, dim=-1)[rank].contiguous() for t in self.tables]
        part.dys = [t.chunk(ranks, dim=-1)[rank].contiguous() for t in self.dys]
        return part

    def expected(self) -> list[Tensor]:
        """The same in float64, from the reference and autograd."""
        weights = self.weights.double().requires_grad_()
        tables = [t.double().requires_grad_() for t in self.tables]
        ys = [reference.lookup(self.codes, weights, t) for t in tables]
        gradients = torch.autograd.grad(ys, [weights, *tables], [dy.double() for dy in self.dys])
        return [*[y.detach() for y in ys], *gradients]


@needs_library
@examples(80)
@given(
    seed=st.integers(0, 2**31),
    tau=st.integers(1, 12),
    num_tables=st.integers(1, 19),
    columns=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    chunks=st.sampled_from([1, 2, 4, 8]),
    tokens=st.sampled_from([0, 1, 2, 17, 130]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_lookup_and_its_gradients_equal_the_reference(
    seed, tau, num_tables, columns, chunks, tokens, dtype
) -> None:
    if tau > 9:
        num_tables, columns = min(num_tables, 3), columns[:1]
    columns = [-(-each // chunks) * chunks for each in columns]
    case = Case(seed, tau, num_tables, columns, tokens, dtype)
    for actual, expected in zip(case.run(chunks), case.expected(), strict=True):
        assert actual.dtype == dtype
        assert_close(actual, expected, TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tau", [1, 4, 8])
def test_many_tokens_equal_the_reference(tau: int, dtype: torch.dtype) -> None:
    """Enough that rows are copied to tiles, in several groups of tables, and no multiple of a vector anywhere."""
    case = Case(tau, tau, 21, [129, 70], 600, dtype)
    for actual, expected in zip(case.run(), case.expected(), strict=True):
        assert_close(actual, expected, TOLERANCE[dtype])


@needs_library
@examples(80)
@given(
    seed=st.integers(0, 2**31),
    tau=st.integers(1, 16),
    num_tables=st.integers(1, 40),
    tokens=st.sampled_from([0, 1, 3, 50]),
    score=st.sampled_from(SCORES),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_hash_and_its_gradient_equal_the_reference(seed, tau, num_tables, tokens, score, dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, num_tables * tau, generator=generator).to(dtype)
    x[torch.rand(x.shape, generator=generator) < 0.1] = -0.0
    d_weights = torch.randn(tokens, num_tables, generator=generator).to(dtype)
    temperature = 0.3 + float(torch.rand((), generator=generator))
    exact = x.double().requires_grad_()
    true_codes, true_weights = reference.hash_codes(exact, num_tables, temperature, score)
    (true_dx,) = torch.autograd.grad(true_weights, exact, d_weights.double())

    codes, weights = cpu.hash_codes(x, num_tables, temperature, score)
    dx = cpu.hash_codes_backward(d_weights, x, num_tables, temperature, score)
    assert codes.dtype == true_codes.dtype
    assert torch.equal(codes, true_codes)
    assert weights.dtype == dx.dtype == dtype
    assert_close(weights, true_weights, TOLERANCE[dtype])
    assert_close(dx, true_dx, TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_hash_of_nan_and_infinities_is_the_reference(score: str, dtype: torch.dtype) -> None:
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-30, -1e-30, 1e38, -1e38, 1.5])
    x = torch.cartesian_prod(special, special).to(
        dtype
    )  # 100 chunks of tau 2, also seen as 50 pairs of chunks
    d_weights = torch.ones(100, 1, dtype=dtype)
    exact = x.double().requires_grad_()
    true_codes, true_weights = reference.hash_codes(exact, 1, 1.0, score)
    (true_dx,) = torch.autograd.grad(true_weights, exact, d_weights.double())
    codes, weights = cpu.hash_codes(x, 1, 1.0, score)
    dx = cpu.hash_codes_backward(d_weights, x, 1, 1.0, score)
    assert torch.equal(codes, true_codes)
    tolerance = {"rtol": TOLERANCE[dtype], "atol": 0, "equal_nan": True, "check_dtype": False}
    torch.testing.assert_close(weights, true_weights.to(dtype), **tolerance)
    # Where a value is infinite or NaN the slope is 0 times that: then only being a number is compared.
    finite = torch.isfinite(true_dx.float()).all(-1)
    torch.testing.assert_close(dx[finite].double(), true_dx[finite], rtol=TOLERANCE[dtype], atol=1e-37)
    assert torch.isfinite(dx[finite]).all()
    assert torch.equal(cpu.hash_codes(x.view(50, 4), 2, 1.0, score)[0].flatten(), codes.flatten())


@needs_library
def test_lookup_passes_nan_infinity_and_minus_zero_on() -> None:
    case = Case(1, 3, 4, [40], 30)
    case.tables[0][1, 3, 5], case.tables[0][2, 0, 7], case.weights[4, 2] = math.nan, math.inf, math.inf
    case.dys[0][9, 11] = -math.inf
    for actual, expected in zip(case.run(), case.expected(), strict=True):
        assert torch.equal(torch.isnan(actual), torch.isnan(expected))
        infinite = torch.isinf(expected)
        assert torch.equal(actual[infinite].double(), expected[infinite])
        rest = torch.isfinite(expected)
        torch.testing.assert_close(actual[rest].double(), expected[rest], rtol=1e-4, atol=1e-5)


@needs_library
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_all_tokens_in_one_row(dtype: torch.dtype) -> None:
    case = Case(2, 8, 3, [33], 700, dtype)
    case.codes.fill_(255)
    y, d_weights, d_tables = case.run()
    for actual, expected in zip((y, d_weights, d_tables), case.expected(), strict=True):
        assert_close(actual, expected, TOLERANCE[dtype])
    assert not d_tables[:, :255].any()


@needs_library
@pytest.mark.parametrize("tokens", [1, 40, 700])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_same_bits_in_every_run_and_for_any_number_of_threads(dtype, tokens: int) -> None:
    case = Case(tokens, 7, 18, [200, 64, 128], tokens, dtype)
    x = torch.randn(tokens, 18 * 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    runs = []
    for number in (1, 2, 2, 3):
        with threads(number):
            codes, weights = cpu.hash_codes(x, 18)
            dx = cpu.hash_codes_backward(case.weights, x, 18, 1.0, SCORES[1])
            runs.append([*case.run(), codes, weights, dx])
    for run in runs[1:]:
        assert_same_bits(run, runs[0])


@needs_library
@pytest.mark.skipif(cpu.instruction_set() != "avx512", reason="the machine has no AVX-512")
@pytest.mark.slow  # it compiles the library again
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_both_instruction_sets_give_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = cpu.load("avx2")
    for seed, tau, num_tables, columns, tokens in (
        (4, 5, 20, [77, 128], 300),
        (5, 10, 3, [130], 50),
        (6, 3, 2, [9], 1),
    ):
        case = Case(seed, tau, num_tables, columns, tokens, dtype)
        x = torch.randn(tokens, num_tables * tau, generator=torch.Generator().manual_seed(seed)).to(dtype) * 3
        x[0, 0] = math.nan
        int8 = torch.randint(-128, 128, case.tables[0].shape, dtype=torch.int8)
        scales = torch.rand(int8.shape[:2])

        def everything(case=case, x=x, k=num_tables, int8=int8, scales=scales) -> list[Tensor]:
            results = [*case.run(), cpu.lookup_int8(case.codes, case.weights, int8, scales)]
            for score in SCORES:
                results += [*cpu.hash_codes(x, k, 0.7, score)]
                results.append(cpu.hash_codes_backward(case.weights, x, k, 0.7, score))
            return results

        wide = everything()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "library", lambda: narrow)
            assert_same_bits(everything(), wide)


@needs_library
@pytest.mark.parametrize("tokens", [3, 300])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_slice_of_columns_is_the_slice_of_the_result(dtype: torch.dtype, tokens: int) -> None:
    case = Case(7, 6, 33, [208], tokens, dtype)
    (y,) = cpu.lookup(case.codes, case.weights, case.tables)
    _, (d_tables,) = cpu.lookup_backward(case.dys, case.codes, case.weights, case.tables)
    for width in (1, 13, 26, 52, 104):
        for first in range(0, 208, width * 3):
            columns = slice(first, first + width)
            tables = [case.tables[0][..., columns]]  # not contiguous
            assert torch.equal(cpu.lookup(case.codes, case.weights, tables)[0], y[..., columns])
            _, (part,) = cpu.lookup_backward([case.dys[0][..., columns]], case.codes, case.weights, tables)
            assert torch.equal(part, d_tables[..., columns])


@needs_library
@pytest.mark.parametrize("backend", [cpu, composition], ids=["cpu", "composition"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(
    "columns",
    [[24, 24, 24], [192, 192, 192], [256], [40], [8, 16], [600], [1280], [2048, 2048], [72, 80, 328]],
)
def test_slices_of_columns_give_nodes_of_the_gradient_of_weights(columns, dtype, backend) -> None:
    """Chunks of 1 to 256 columns: several in a vector, several vectors, several passes; and no multiple of a vector."""
    case = Case(8, 5, 9, columns, 130, dtype)
    with threads(2):
        whole, d_tables = backend.lookup_backward(case.dys, case.codes, case.weights, case.tables, 8)
    assert whole.dtype == torch.float32
    assert_close(whole, case.expected()[len(columns)], 3e-6)
    for ranks in (2, 4, 8):
        parts = []
        for rank in range(ranks):
            part = case.slice(rank, ranks)
            node, tables = backend.lookup_backward(
                part.dys, part.codes, part.weights, part.tables, 8 // ranks
            )
            parts.append(node)
            assert_same_bits(tables, [t.chunk(ranks, dim=-1)[rank].contiguous() for t in d_tables])
        assert_same_bits([pairwise_sum(torch.stack(parts, -1))], [whole])


@needs_library
@pytest.mark.parametrize("backend", [cpu, composition], ids=["cpu", "composition"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 64, 130, 1000])
def test_column_sums(rows: int, dtype: torch.dtype, backend) -> None:
    x = torch.randn(rows, 208, generator=torch.Generator().manual_seed(rows)).to(dtype)
    sums = backend.column_sums(x)
    assert sums.dtype == torch.float32
    assert_close(sums, x.double().sum(0), 1e-6)
    for width in (1, 13, 26, 52, 104):
        for number, part in zip((1, 2, 3), x.split(width, dim=-1), strict=False):
            with threads(number):
                assert_same_bits([backend.column_sums(part)], [sums[(number - 1) * width :][:width]])


@needs_library
def test_sets_looked_up_together_give_what_each_gives_alone() -> None:
    case = Case(8, 8, 16, [64, 64, 30], 520)
    *ys, d_weights = case.run()[:4]
    alone = [cpu.lookup(case.codes, case.weights, [t])[0] for t in case.tables]
    assert_same_bits(ys, alone)
    parts = [
        cpu.lookup_backward([dy], case.codes, case.weights, [t])[0]
        for dy, t in zip(case.dys, case.tables, strict=True)
    ]
    assert_close(d_weights, sum(p.double() for p in parts), 1e-6)


@needs_library
@pytest.mark.parametrize("weight_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("table_dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("code_dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_mix_of_types(code_dtype, table_dtype, weight_dtype) -> None:
    case = Case(9, 5, 6, [37], 20, table_dtype)
    case.codes, case.weights = case.codes.to(code_dtype), case.weights.to(weight_dtype)
    y, d_weights, d_tables = case.run()
    assert (y.dtype, d_weights.dtype, d_tables.dtype) == (table_dtype, weight_dtype, table_dtype)
    case.weights = case.weights.to(table_dtype)  # rounded first
    for actual, expected in zip((y, d_weights, d_tables), case.expected(), strict=True):
        assert_close(actual, expected, max(TOLERANCE[table_dtype], TOLERANCE[weight_dtype]))


@needs_library
@pytest.mark.parametrize("tokens", [0, 1, 9, 800])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_int8(dtype: torch.dtype, tokens: int) -> None:
    case = Case(10, 6, 12, [100], tokens, dtype)
    tables = torch.randint(-128, 128, case.tables[0].shape, dtype=torch.int8)
    scales = torch.rand(tables.shape[:2])
    y = cpu.lookup_int8(case.codes, case.weights, tables, scales)
    wide = tables.double() * scales.double().unsqueeze(-1)
    expected = reference.lookup(case.codes, case.weights.double(), wide)
    assert y.dtype == dtype
    assert_close(y, expected, TOLERANCE[dtype])


@needs_library
@pytest.mark.parametrize(
    ("code_dtype", "code"),
    [
        *((torch.uint8, c) for c in (64, 255)),
        *((d, c) for d in (torch.int16, torch.int32, torch.int64) for c in (64, -1, 2**14)),
        (torch.int64, 2**40),
        (torch.int64, -(2**63)),
    ],
)
def test_a_code_out_of_range_raises(code_dtype: torch.dtype, code: int) -> None:
    case = Case(11, 6, 5, [20], 70)
    case.codes = case.codes.to(code_dtype)
    case.codes[41, 3] = code
    int8 = torch.zeros(5, 64, 20, dtype=torch.int8)
    low, high = min(0, code), max(63, code)  # both borders are among the codes
    message = rf"codes must be in \[0, 64\) for tables of shape \(5, 64, 20\), got codes from {low} to {high}"
    with pytest.raises(ValueError, match=message):
        cpu.lookup(case.codes, case.weights, case.tables)
    with pytest.raises(ValueError, match=message):
        cpu.lookup_backward(case.dys, case.codes, case.weights, case.tables)
    with pytest.raises(ValueError, match=message):
        cpu.lookup_int8(case.codes, case.weights, int8, torch.ones(5, 64))


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=str)
def test_more_than_2_to_the_31_elements(dtype: torch.dtype) -> None:
    """Only the pages of the rows that are hit come into being; the indices pass 2**31 all the same."""
    num_tables, rows, columns = 9, 2**16, 4096  # 2.4e9 elements
    tables = torch.empty(num_tables, rows, columns, dtype=dtype)
    codes = torch.tensor([[0] * num_tables, [rows - 1] * num_tables], dtype=torch.int32)
    weights = torch.rand(2, num_tables, generator=torch.Generator().manual_seed(12)).to(torch.bfloat16)
    hit = torch.randint(-99, 100, (2, num_tables, columns), generator=torch.Generator().manual_seed(13))
    tables[:, 0], tables[:, rows - 1] = hit[0].to(dtype), hit[1].to(dtype)
    if dtype == torch.int8:
        y = cpu.lookup_int8(codes, weights, tables, torch.ones(num_tables, rows))
    else:
        (y,) = cpu.lookup(codes, weights, [tables])
    assert_close(y, (weights.double().unsqueeze(-1) * hit.double()).sum(1), 1e-2)


# --- The build. Each in its own process, with its own cache.

REPORT = "from mf_train.kernels import cpu; print(cpu.library() is not None, cpu.reason())"


def report(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    variables = {**inherited, "XDG_CACHE_HOME": str(cache), **environment}
    command = [sys.executable, "-c", REPORT]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, check=True)


def test_without_a_compiler_the_reason_says_so(tmp_path: Path) -> None:
    done = report(tmp_path, PATH=str(tmp_path))
    assert done.stdout.startswith("False there is no compiler g++")


@pytest.mark.skipif(cpu.instruction_set() == "neon", reason="every aarch64 has vector instructions")
def test_without_vector_instructions_the_reason_says_so(tmp_path: Path) -> None:
    done = report(tmp_path, ATEN_CPU_CAPABILITY="default")
    assert done.stdout.startswith("False this machine offers default")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = report(tmp_path / "file")
    assert done.stdout.startswith("False")
    assert "set XDG_CACHE_HOME to a folder that can be written" in done.stdout


@needs_library
def test_a_copy_of_the_package_takes_the_same_library(tmp_path: Path) -> None:
    """Each launched run has a copy of its own, and they must not all compile."""
    assert cpu.library() is not None
    shutil.copytree(REPOSITORY / "mf_train", tmp_path / "mf_train")
    variables = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}  # without a compiler
    place = f"import mf_train; print(mf_train.__file__.startswith({str(tmp_path)!r})); {REPORT}"
    done = subprocess.run(
        [sys.executable, "-c", place], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "True"]


@needs_library
@pytest.mark.parametrize("order", ["torch, sentencepiece", "sentencepiece, torch"])
def test_it_computes_with_torch_s_openmp(order: str) -> None:
    """Other packages bring such a library, too: sentencepiece's comes before torch's or after it in memory."""
    code = f"import {order}; from mf_train.kernels import cpu; cpu.library(); print(cpu._openmp_runtime())"
    variables = {**os.environ, "LD_DEBUG": "bindings"}  # the loader says where it finds each function
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True
    )
    found = re.findall(r"binding file \S*/cpu-\S+ \[0\] to (\S+) .* `(?:GOMP|omp)_", done.stderr)
    assert len(found) >= 3 and {os.path.realpath(file) for file in found} == {
        os.path.realpath(done.stdout.strip())
    }


@needs_library
@pytest.mark.slow
def test_eight_processes_build_at_once(tmp_path: Path) -> None:
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", REPORT],
            cwd=REPOSITORY,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    outputs = [process.communicate() for process in starts]
    assert [out.split()[0] for out, _ in outputs] == ["True"] * 8
    assert sum(err.count("compiling") for _, err in outputs) == 1
    (library,) = (tmp_path / "mf_train" / "kernels").glob("*.so")
    ctypes.CDLL(str(library))


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", list(cpu.INSTRUCTION_SETS))
def test_under_sanitizers(instruction_set: str, tmp_path: Path) -> None:
    sources = sorted(build.SOURCES.glob("*.cpp"))
    options = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    _run_driver("sanitize_driver.cpp", sources, instruction_set, options, tmp_path, rounds=60)


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("instruction_set", list(cpu.INSTRUCTION_SETS))
@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        (["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], 40),
        (["-fsanitize=thread", "-DOWN_THREADS"], 8),  # gigabytes of its own in more
    ],
    ids=["address", "thread"],
)
def test_the_decoder_under_sanitizers(
    options: list[str], rounds: int, instruction_set: str, tmp_path: Path
) -> None:
    """Random models, batches and threads, four callers at a time on one model."""
    sources = [build.SOURCES / "decode.cpp"]
    _run_driver("decode_driver.cpp", sources, instruction_set, options, tmp_path, rounds)


def _run_driver(
    driver: str, sources: list[Path], instruction_set: str, options: list[str], folder: Path, rounds: int
) -> None:
    own = cpu.instruction_set()
    if instruction_set not in (("avx512", "avx2") if own == "avx512" else (own,)):
        pytest.skip(f"the machine has no {instruction_set}")
    flags = ["-O1", "-g", "-std=c++17", "-ffp-contract=off", "-fopenmp"]
    program = folder / "driver"
    files = [Path(__file__).with_name(driver), *sources]
    arguments = [*flags, *cpu.INSTRUCTION_SETS[instruction_set], *options, f"-I{build.SOURCES}", *files]
    subprocess.run(["g++", *arguments, "-o", program], check=True)
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-4000:]
