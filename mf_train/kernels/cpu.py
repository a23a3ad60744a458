"""Hash and lookup on the CPU in C++ (csrc/), for float32 and bfloat16: compiled once, called through ctypes.

The functions have the seam's surface; what the seam checks of values they leave to it, but no tensor reaches C++ that
is not what C++ takes it for (`address`). Codes out of range raise. Sums and roundings are those that
`mf_train.kernels.lookup` names; the same bits in every run, for any number of threads, on AVX2, AVX-512 and NEON.
"""

import ctypes
import os
import platform
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build
from .buffers import address, check_chunks
from .composition import Sum, add_biases, add_to, code_dtype

INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "neon": [],  # every aarch64 has it
}
# -ffp-contract=off: GCC would fuse multiplications and additions that are written apart, differently for each
# instruction set. -fno-math-errno, -fno-trapping-math: roots and comparisons become vectors; no result changes.
# -Wno-uninitialized: GCC 12's own headers of intrinsics.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fPIC",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
]

# As csrc/operation.h numbers them.
FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_CODES = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}
OUT_OF_RANGE, _NO_MEMORY = 1, 2

_pointer, _int32, _int64, _float = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_pointers, _int64s = ctypes.POINTER(_pointer), ctypes.POINTER(_int64)
_READS = [_pointer, _int32, _pointer, _int32, _int64, _int64, _int64]  # codes, weights, tokens, tables, rows
_SETS = [_int32, _pointers, _int64s, _int32]  # number, tables, columns, type
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "mf_hash": (None, [_pointer, _int32, _int64, _int32, _float, _int32, _pointer, _pointer, _int32]),
    "mf_hash_backward": (
        None,
        [_pointer, _pointer, _int32, _int64, _int32, _float, _int32, _pointer, _int32],
    ),
    "mf_lookup": (_int32, [*_READS, *_SETS, _pointers, _int32]),
    "mf_lookup_backward": (_int32, [_pointers, *_READS, *_SETS, _int64, _pointer, _pointers, _int32]),
    "mf_column_sums": (_int32, [_pointer, _int32, _int64, _int64, _pointer, _int32]),
    "mf_lookup_int8": (_int32, [*_READS, _pointer, _int64, _pointer, _pointer, _int32]),
    "mf_count": (_int32, [_pointer, _int32, *[_int64] * 4, _pointer, _int32]),
    "mf_norm_moments": (None, [_pointer, _int32, *[_int64] * 3, _int32, _pointer, _int32]),
    "mf_norm_normalise": (
        None,
        [
            *(_pointer, _int32, _pointer, _int64, _pointer, _pointer, _int32, *[_int64] * 3),
            *(_int32, _float, *[_pointer] * 3, _int32),
        ],
    ),
    "mf_norm_gradient_sums": (
        None,
        [_pointer, _pointer, _int32, *[_pointer] * 3, _int32, *[_int64] * 3, _pointer, _int32],
    ),
    "mf_norm_gradients": (
        _int32,
        [
            *(_pointer, _pointer, _int32, *[_pointer] * 3, _int32),
            *(_pointer, *[_int64] * 4, _int32, *[_pointer] * 3, _int32),
        ],
    ),
    "mf_loss_sums": (None, [_pointer, _int32, _pointer, *[_int64] * 3, _pointer, _int32]),
    "mf_loss_gradient": (
        None,
        [_pointer, _int32, *[_pointer] * 3, _int64, _int64, _float, _pointer, _int32],
    ),
    "mf_adamw": (
        _int32,
        [_pointer, *[_int32, _pointer, _pointer] * 3, _int64, _int64, _pointer, _pointer, _int32],
    ),
    "mf_decode": (_int32, [_pointer, _pointer]),
}


def library() -> ctypes.CDLL | None:
    """The compiled operations for this machine, built by the first call; None where they cannot be (see `reason`)."""
    return _library_or_reason()[0]


def reason() -> str:
    """Why `library` is None, and what would help; "" where it is not."""
    return _library_or_reason()[1]


@lru_cache(maxsize=1)
def _library_or_reason() -> tuple[ctypes.CDLL | None, str]:
    chosen = instruction_set()
    if chosen not in INSTRUCTION_SETS:
        return None, f"this machine offers {chosen}; the C++ operation is written for AVX2, AVX-512 and NEON"
    try:
        return load(chosen), ""
    except build.BuildError as error:
        return None, str(error)


def instruction_set() -> str:
    """This machine's, in INSTRUCTION_SETS or not: x86's as torch names it, which ATEN_CPU_CAPABILITY lowers."""
    if platform.machine() == "aarch64":
        return "neon"
    return torch.backends.cpu.get_cpu_capability().lower()


def load(instruction_set: str) -> ctypes.CDLL:
    """The operations compiled for one of INSTRUCTION_SETS, which the machine must have.

    Raises:
        build.BuildError: they cannot be compiled or loaded.
    """
    runtime = _openmp_runtime()
    path = build.compile_once(*recipe(instruction_set), commands(instruction_set))
    try:
        # torch has its OpenMP library where all others look first; said again here for a torch that has not
        ctypes.CDLL(str(runtime), os.RTLD_GLOBAL | os.RTLD_NOLOAD)
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"{path} cannot be loaded: {error}") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def recipe(instruction_set: str) -> tuple[str, list[Path], list[str]]:
    """The library's name, and the sources and flags that decide what it is."""
    sources = sorted([*build.SOURCES.glob("*.cpp"), *build.SOURCES.glob("*.h")])
    return f"cpu-{instruction_set}", sources, [*FLAGS, *INSTRUCTION_SETS[instruction_set]]


def commands(
    instruction_set: str, compiler: str = "g++", more: Sequence[str] = ()
) -> Callable[[Path], build.Commands]:
    """What compiles, with `more` flags that change no result, and links it, given the file to write.

    Linked with no OpenMP library (-fopenmp would name GCC's own, a second pool of threads beside torch's): the loader
    takes the functions from the one that torch computes with, wherever that lies.
    """
    _, sources, flags = recipe(instruction_set)

    def lines(output: Path) -> build.Commands:
        objects = {
            str(source): str(output.with_name(f"{source.stem}.o"))
            for source in sources
            if source.suffix == ".cpp"
        }
        compiling = [[compiler, *flags, *more, "-c", source, "-o", file] for source, file in objects.items()]
        return [compiling, [[compiler, "-shared", *objects.values(), "-o", str(output)]]]

    return lines


def _openmp_runtime() -> Path:
    """The OpenMP library that torch computes with. Other packages bring their own: sentencepiece, scikit-learn."""
    address = _address_that_torch_calls("omp_get_max_threads")
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        raise build.BuildError("there is no /proc/self/maps to find torch's OpenMP library in") from None
    for line in maps.splitlines():
        places, *_, name = line.split(maxsplit=5)
        first, end = (int(place, 16) for place in places.split("-"))
        if first <= address < end and Path(name).name.startswith(("libgomp", "libiomp5")):
            return Path(name)
    raise build.BuildError("torch has loaded no OpenMP library named libgomp or libiomp5")


def _address_that_torch_calls(name: str) -> int:
    """Of a function, as the loader finds it for torch: what is loaded for all comes first, then what torch needs.

    0 where there is none.
    """
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            function = getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0


def function(name: str) -> Callable[..., int]:
    """An operation of the library. Raises RuntimeError where there is none."""
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"the C++ operation is not available: {reason()}")
    return getattr(loaded, name)


def call(name: str, *arguments: Any) -> int:
    """An operation's status with these tensors, addresses (None: a null pointer) and numbers, and torch's threads.

    Raises ValueError for a tensor that is not contiguous or not on the CPU: its dtype and shape are for the caller to
    check. Raises MemoryError where the operation found no scratch memory.
    """
    pointers = [address(name, a, a.dtype, a.shape) if isinstance(a, Tensor) else a for a in arguments]
    status = function(name)(*pointers, torch.get_num_threads())
    if status == _NO_MEMORY:
        raise MemoryError(f"{name}: no scratch memory")
    return status


def float_type(tensor: Tensor) -> int:
    """The number of a tensor's dtype. Raises ValueError for a dtype that C++ does not compute in."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"C++ computes in float32 and bfloat16, got {tensor.dtype}")
    return FLOATS[tensor.dtype]


def hash_codes(
    x: Tensor, num_tables: int, temperature: float = 1.0, score: str = "probability"
) -> tuple[Tensor, Tensor]:
    """Codes and weights [..., K] of x [..., D]; see `mf_train.kernels.hash_codes`."""
    x = x.contiguous()
    tau = x.shape[-1] // num_tables
    shape = (*x.shape[:-1], num_tables)
    codes, weights = x.new_empty(shape, dtype=code_dtype(tau)), x.new_empty(shape)
    call(
        *("mf_hash", address("x", x, x.dtype, (*shape[:-1], num_tables * tau)), float_type(x)),
        *(weights.numel(), tau, temperature, score != "probability", codes, weights),
    )
    return codes, weights


def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str
) -> Tensor:
    """d x [..., D] from d weights [..., K] and x alone; the weights are computed again."""
    x, d_weights = x.contiguous(), d_weights.to(x.dtype).contiguous()
    tau = x.shape[-1] // num_tables
    dx = torch.empty_like(x)
    call(
        "mf_hash_backward",
        address("d_weights", d_weights, x.dtype, (*x.shape[:-1], num_tables)),
        address("x", x, x.dtype, (*x.shape[:-1], num_tables * tau)),
        *(float_type(x), d_weights.numel(), tau, temperature, score != "probability", dx),
    )
    return dx


def lookup(
    codes: Tensor, weights: Tensor, tables: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> list[Tensor]:
    """y [..., O_i] of each table set [K, 2**tau, O_i]; all read the same codes and weights [..., K].

    `biases` [O_i], of each set or of none, are added to what was rounded.

    Raises:
        ValueError: a code outside [0, 2**tau).
    """
    codes, weights = codes.contiguous(), weights.contiguous()
    tables = [t.contiguous() for t in tables]
    ys = [t.new_empty((*codes.shape[:-1], t.shape[2])) for t in tables]
    into = _addresses("y", ys, tables[0].dtype, codes.shape[:-1], tables)
    status = call("mf_lookup", *_reads(codes, weights, tables[0]), *_sets(tables), into)
    _check(status, codes, tables[0])
    return add_biases(ys, biases)


def lookup_backward(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    chunks: int = 1,
    sums: Sequence[Sum] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """d weights [..., K] float32, summed over the sets, and d tables of each set, from dy [..., O_i] of each.

    d weights is summed over `chunks` equal chunks of columns, of all sets together, and then over pairs of chunks.
    With `sums` d tables go there, and none are returned.

    Raises:
        ValueError: a code outside [0, 2**tau), or 2**31 tokens or more.
    """
    codes, weights = codes.contiguous(), weights.contiguous()
    tables = [t.contiguous() for t in tables]
    dys = [dy.to(t.dtype).contiguous() for dy, t in zip(dys, tables, strict=True)]
    d_weights = weights.new_empty(weights.shape, dtype=torch.float32)
    d_tables = [torch.empty_like(t) for t in tables]
    if codes.numel() // codes.shape[-1] >= 2**31:
        raise ValueError(f"the backward pass takes fewer than 2**31 tokens, got codes {tuple(codes.shape)}")
    for table in tables:
        check_chunks(table.shape[2], chunks)
    status = call(
        "mf_lookup_backward",
        _addresses("dy", dys, tables[0].dtype, codes.shape[:-1], tables),
        *(*_reads(codes, weights, tables[0]), *_sets(tables), chunks, d_weights),
        _addresses("d_tables", d_tables, tables[0].dtype, tables[0].shape[:2], tables),
    )
    _check(status, codes, tables[0])
    return d_weights, d_tables if sums is None else add_to(sums, d_tables)


def column_sums(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last: [..., D] -> [D] float32. A column's bits depend on that column alone."""
    x = x.contiguous()
    sums = x.new_empty(x.shape[-1], dtype=torch.float32)
    call(
        *("mf_column_sums", address("x", x, x.dtype, x.shape), float_type(x)),
        *(x.shape[:-1].numel(), x.shape[-1], sums),
    )
    return sums


def lookup_int8(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """y [..., O] = sum_k weight_k * scale_k[code_k] * table_k[code_k], in the weights' dtype; without gradients.

    tables int8 [K, 2**tau, O], scales float32 [K, 2**tau]. Sums over k in order, in float32.

    Raises:
        ValueError: a code outside [0, 2**tau).
    """
    codes, weights, tables, scales = (t.contiguous() for t in (codes, weights, tables, scales))
    y = weights.new_empty((*codes.shape[:-1], tables.shape[2]))
    status = call(
        "mf_lookup_int8",
        *_reads(codes, weights, tables),
        *(address("tables", tables, torch.int8, tables.shape), tables.shape[2]),
        *(address("scales", scales, torch.float32, tables.shape[:2]), y),
    )
    _check(status, codes, tables)
    return y


def count_codes(codes_nk: Tensor, counts: Tensor) -> None:
    """Add codes [N, K], whose last dimension lies in one piece, to counts int64 [K, rows], contiguous.

    Raises:
        ValueError: a code outside [0, rows); the counts are then of no use any more.
    """
    tokens, tables = codes_nk.shape
    if not codes_nk.is_cpu or (tables > 1 and codes_nk.stride(1) != 1):
        raise ValueError(
            "codes must lie in one piece along their last dimension, on the CPU, got strides "
            f"{codes_nk.stride()} on {codes_nk.device}"
        )
    sizes = tokens, codes_nk.stride(0), tables, counts.shape[1]
    into = address("counts", counts, torch.int64, (tables, counts.shape[1]))
    status = call("mf_count", codes_nk.data_ptr(), _code_type(codes_nk), *sizes, into)
    _check(status, codes_nk, counts)


def _code_type(codes: Tensor) -> int:
    if codes.dtype not in _CODES:
        raise ValueError(f"codes must be uint8, int16, int32 or int64, got {codes.dtype}")
    return _CODES[codes.dtype]


def _reads(codes: Tensor, weights: Tensor, tables: Tensor) -> tuple[int, ...]:
    num_tables, rows, _ = tables.shape
    shape = (*codes.shape[:-1], num_tables)
    return (
        *(address("codes", codes, codes.dtype, shape), _code_type(codes)),
        *(address("weights", weights, weights.dtype, shape), float_type(weights)),
        *(codes.numel() // num_tables, num_tables, rows),
    )


def _sets(tables: Sequence[Tensor]) -> tuple[Any, ...]:
    columns = (_int64 * len(tables))(*[t.shape[2] for t in tables])
    addresses = _addresses("tables", tables, tables[0].dtype, tables[0].shape[:2], tables)
    return len(tables), addresses, columns, float_type(tables[0])


def _addresses(
    name: str, tensors: Sequence[Tensor], dtype: torch.dtype, leading: Sequence[int], tables: Sequence[Tensor]
) -> Any:
    """An array of where tensors [*leading, O_i] are, one for each set of tables."""
    pairs = zip(tensors, tables, strict=True)
    found = [address(name, tensor, dtype, (*leading, table.shape[2])) for tensor, table in pairs]
    return (_pointer * len(found))(*found)


def _check(status: int, codes: Tensor, tables: Tensor) -> None:
    if status == OUT_OF_RANGE:
        raise ValueError(
            f"codes must be in [0, {tables.shape[1]}) for tables of shape {tuple(tables.shape)}, "
            f"got codes from {codes.min()} to {codes.max()}"
        )
