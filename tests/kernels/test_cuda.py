"""The CUDA lookup: machine code where nvcc is, its thread code emulated on a CPU. On a GPU: tests/gpu/test_cuda.py."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mf_train.kernels import cuda, reference
from mf_train.kernels.build import SOURCES
from mf_train.kernels.composition import code_dtype

EMULATION = Path(__file__).with_name("lookup_sm90_emulation.cpp")
H100_MULTIPROCESSORS, H100_SHARED_BYTES = 132, 232448

needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="nvcc is not installed")


def random_arguments(
    seed: int, tokens: int, num_tables: int, bits: int, columns: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    options = {"generator": generator, "device": device}
    codes = torch.randint(0, 2**bits, (tokens, num_tables), **options)
    codes[: tokens // 4, 0], codes[: tokens // 4, -1] = 0, 2**bits - 1
    weights = torch.rand(tokens, num_tables, **options)
    tables = torch.randn(num_tables, 2**bits, columns, **options)
    return codes.to(code_dtype(bits)), weights.to(dtype), tables.to(dtype)


def sum_in_order(codes: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    """Float32 sums over k in order, rounded once. A product of bfloat16 values is exact in float32."""
    sums = torch.zeros(codes.shape[0], tables.shape[2], device=tables.device)
    for k in range(tables.shape[0]):
        sums = sums + weights[:, k, None].float() * tables[k].float()[codes[:, k].long()]
    return sums.to(tables.dtype)


def assert_right(y: Tensor, codes: Tensor, weights: Tensor, tables: Tensor) -> None:
    """Within rounding of the float64 reference; for bfloat16 also the very bits of float32 sums in order."""
    expected = reference.lookup(codes, weights, tables)
    tolerance = 2**-8 if tables.dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=1e-5)
    if tables.dtype == torch.bfloat16:
        assert torch.equal(y, sum_in_order(codes, weights, tables))


# ---------------------------------------------------------------- machine code


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library, compiled with warnings as errors, and what the assembler says about its kernels."""
    output = tmp_path_factory.mktemp("sm90") / "lookup.so"
    source = SOURCES / "lookup_sm90.cu"
    flags = [*cuda.FLAGS, "-Werror", "all-warnings", "-Xptxas", "-v"]
    done = subprocess.run(
        [str(cuda.find_nvcc()), *flags, str(source), "-o", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return output, done.stderr


@needs_nvcc
def test_kernels_fit_in_registers(compiled: tuple[Path, str]) -> None:
    kernels = re.findall(
        r"Compiling entry function '\w*lookup_kernel\w*'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        compiled[1],
        re.DOTALL,
    )
    assert len(kernels) == 12  # two types, two widths of rows, three sizes of tile
    for stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0")
        assert int(registers) * 384 <= 65536


def find_disassembler() -> str | None:
    """cuobjdump of the CUDA toolkit, or the one that comes with triton."""
    found = shutil.which("cuobjdump")
    if found is None:
        triton = pytest.importorskip(
            "triton", reason="neither cuobjdump nor triton's copy of it is installed"
        )
        bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        found = str(bundled) if bundled.is_file() else None
    return found


@needs_nvcc
def test_machine_code_of_the_kernels(compiled: tuple[Path, str]) -> None:
    """Bulk copies, 16-byte shared loads, and nothing slow between the wait for a table and its release."""
    disassembler = find_disassembler()
    if disassembler is None:
        pytest.skip("cuobjdump is not installed")
    text = subprocess.run(
        [disassembler, "-sass", compiled[0]], capture_output=True, text=True, check=True
    ).stdout
    kernels = [part for part in text.split("Function : ") if "lookup_kernel" in part.split("\n")[0]]
    assert len(kernels) == 12
    for kernel in kernels:
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_.]+)", kernel)
        assert {"UTMALDG.2D", "UTMALDG.2D.MULTICAST"} <= set(names)
        assert any(name.startswith("UBLKCP") for name in names)
        assert not [name for name in names if re.match(r"LDL|STL|LD\.|ST\.", name)]  # local, generic
        assert {name for name in names if name.startswith("LDS")} == {"LDS.128"}
        assert {name for name in names if name.startswith("STG")} == {"STG.E.128"}
        wait = next(i for i, name in enumerate(names) if "TRYWAIT" in name)
        release = next(i for i, name in enumerate(names) if i > wait and name.startswith("SYNCS.ARRIVE"))
        loop = names[wait:release]
        passes = int(re.search(r"ELi\d+ELi(\d+)ELi12E", kernel)[1])
        bfloat16 = "BFloat16" in kernel.split("\n")[0]
        assert loop.count("FFMA") == passes * (8 if bfloat16 else 4)
        assert loop.count("LDS.128") == passes + passes // (4 if bfloat16 else 2)
        assert not [name for name in loop if name.startswith(("MEMBAR", "CCTL", "FENCE", "LDG", "STG"))]


@needs_nvcc
def test_build_is_cached_and_has_the_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cuda._library.cache_clear()
    library = cuda._library()
    (built,) = tmp_path.rglob("lookup_sm90*.so")
    made = built.stat().st_mtime_ns
    assert cuda.build() == built and built.stat().st_mtime_ns == made
    assert library.mf_lookup_sm90_entry_bytes(1537, 3, 2) == 2 * 1536 * 3 * 4
    assert b"invalid argument" in library.mf_lookup_sm90_error(1)
    invalid = [(5, 1, 11), (5, 0, 8), (5, 2**24, 8), (-1, 1, 8)]
    for sizes in invalid:
        assert library.mf_lookup_sm90(None, None, 2, None, *sizes, 64, 0, None) == 1
        assert library.mf_lookup_sm90_pack(None, 1, None, 2, None, *sizes, 0, None) == 1
    assert library.mf_lookup_sm90(None, None, 2, None, 5, 1, 8, 63, 0, None) == 1
    assert library.mf_lookup_sm90(None, 8, 2, None, 5, 1, 8, 64, 0, None) == 716  # misaligned address
    cuda._library.cache_clear()


# ---------------------------------------------------------------- the emulation on a CPU


@pytest.fixture(scope="module", params=["thread", pytest.param("address,undefined", marks=pytest.mark.slow)])
def emulation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernel's thread code on CPU threads, under a sanitizer; see the source for what that shows."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    program = tmp_path_factory.mktemp("emulation") / "emulation"
    flags = [
        "-std=c++20",
        "-O1",
        "-g",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-fsanitize={request.param}",
    ]
    command = ["g++", *flags, "-fno-sanitize-recover=all", f"-I{SOURCES}", str(EMULATION), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def emulate(
    program: Path,
    folder: Path,
    arguments: tuple[Tensor, Tensor, Tensor],
    cluster: int,
    stages: int,
    warps: int = 2,
) -> Tensor:
    codes, weights, tables = arguments
    num_tables, rows, columns = tables.shape
    bits = rows.bit_length() - 1
    header = [codes.shape[0], columns, num_tables, bits, tables.element_size()]
    header += [4 if bits == cuda.MAX_BITS else 8, warps, cluster, stages, 7]
    parts = [torch.tensor(header), codes.long(), weights.to(tables.dtype), tables]
    problem, result = folder / "problem", folder / "y"
    problem.write_bytes(b"".join(part.contiguous().view(torch.uint8).numpy().tobytes() for part in parts))
    done = subprocess.run([program, problem, result], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    y = torch.frombuffer(bytearray(result.read_bytes()), dtype=tables.dtype)
    return y.view(codes.shape[0], columns)


BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("tokens", "num_tables", "bits", "columns", "dtype", "cluster", "stages"),
    [
        (1, 1, 1, 8, BF16, 1, 8),  # one row of everything, fewer tables than stages
        (31, 9, 2, 72, BF16, 4, 2),  # one block of four has tokens; a row of each slice is each block's share
        (32, 67, 3, 64, BF16, 2, 3),
        (70, 13, 4, 136, BF16, 2, 4),  # odd tiles, columns past the last
        (97, 5, 8, 40, BF16, 1, 6),
        (65, 5, 9, 64, BF16, 2, 3),
        (65, 4, 9, 8, BF16, 1, 2),  # two boxes a slice
        (130, 5, 10, 40, BF16, 2, 3),  # rows of 64 bytes
        (33, 6, 4, 36, F32, 2, 3),
        (70, 5, 8, 4, F32, 4, 5),
        (130, 4, 10, 20, F32, 1, 2),
    ],
)
def test_emulated_threads_sum_rows(
    emulation: Path, tmp_path: Path, tokens, num_tables, bits, columns, dtype, cluster, stages
) -> None:
    arguments = random_arguments(tokens + bits, tokens, num_tables, bits, columns, dtype)
    assert_right(emulate(emulation, tmp_path, arguments, cluster, stages), *arguments)


@pytest.mark.parametrize(
    ("tokens", "bits", "dtype", "cluster"),
    [
        (1000, 4, BF16, 1),
        (1000, 4, F32, 1),
        (100, 10, BF16, 2),
    ],  # the last: a block of the cluster has no tile
)
def test_emulated_tile_of_the_real_size(
    emulation: Path, tmp_path: Path, tokens, bits, dtype, cluster
) -> None:
    """12 warps, 16 passes: 768 tokens a block, or 1536 with rows of 64 bytes."""
    arguments = random_arguments(3, tokens, 5, bits, 8, dtype)
    assert_right(emulate(emulation, tmp_path, arguments, cluster, stages=3, warps=12), *arguments)


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_emulated_code_outside_its_table_gives_nan_to_its_token_alone(
    emulation: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    codes, weights, tables = random_arguments(4, 40, 3, 4, 16, dtype)
    codes = codes.long()
    wrong = {0: 16, 7: -1, 31: 2**40, 39: -(2**63)}
    expected = reference.lookup(codes, weights, tables)
    for token, code in wrong.items():
        codes[token, token % 3] = code
        expected[token] = torch.nan
    y = emulate(emulation, tmp_path, (codes, weights, tables), cluster=2, stages=2)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-5, equal_nan=True)


def test_emulated_infinities_and_nans_reach_only_their_readers(emulation: Path, tmp_path: Path) -> None:
    codes, weights, tables = random_arguments(5, 64, 3, 3, 24, BF16)
    tables[0, 1, 5], tables[1, 2, 6], tables[2, 3, 7] = torch.inf, -torch.inf, torch.nan
    y = emulate(emulation, tmp_path, (codes, weights, tables), cluster=1, stages=3)
    expected = reference.lookup(codes, weights, tables)
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-5, equal_nan=True)


def test_plans_fit_in_shared_memory(emulation: Path) -> None:
    for bits in range(1, cuda.MAX_BITS + 1):
        for value_bytes in (2, 4):
            for tokens in (1, 2048, 65536):
                sizes = [tokens, 1024, bits, value_bytes, H100_MULTIPROCESSORS]
                command = [str(emulation), "plan", *map(str, sizes)]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                lanes, passes, cluster, stages, shared_bytes = map(int, output.split())
                assert (lanes, passes in (4, 8, 16)) == (8 if bits < 10 else 4, True)
                assert 2**bits % cluster == 0 and stages >= 2 and shared_bytes <= H100_SHARED_BYTES


# ---------------------------------------------------------------- arguments


def test_what_the_kernel_does_not_take_is_named() -> None:
    def why(codes: Tensor, weights: Tensor, *tables: Tensor) -> str:
        return cuda.unsupported_reason(codes, weights, tables)

    codes, weights, tables = random_arguments(0, 4, 3, 4, 16, BF16)
    assert why(codes, weights, tables) == ""
    assert why(codes, weights, tables, tables[..., :8].contiguous()) == ""
    assert "torch.int8" in why(codes.to(torch.int8), weights, tables)
    assert "float16" in why(codes, weights, tables.half())
    assert "tables[1] is torch.float32" in why(codes, weights, tables, tables.float())
    assert "2048 rows" in why(codes, weights, torch.zeros(3, 2048, 16, dtype=BF16))
    assert "rows of 12" in why(codes, weights, torch.zeros(3, 16, 12, dtype=BF16))
    assert "not contiguous" in why(codes, weights, tables[..., :8])
    shifted = torch.zeros(3 * 16 * 16 + 1, dtype=BF16)[1:].view(3, 16, 16)
    assert "not contiguous from" in why(codes, weights, shifted)
    assert "on meta" in why(codes, weights, tables.to("meta"))
    assert "2**31" in why(codes, weights, torch.empty(2**23, 256, 16, dtype=BF16, device="meta"))


def test_tensors_of_a_cpu_are_refused() -> None:
    arguments = random_arguments(0, 4, 3, 4, 16, BF16)
    codes, weights, tables = arguments
    assert not cuda.supports(codes, weights, [tables])
    with pytest.raises(ValueError, match=r"tensors are on cpu; use backend='triton'"):
        cuda.lookup(codes, weights, [tables])
