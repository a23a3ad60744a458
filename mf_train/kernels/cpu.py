"""Hash and lookup on the CPU in C++ (csrc/), for float32 and bfloat16: compiled once, called through ctypes.

The functions have the seam's surface and take arguments that it has checked. Codes out of range raise. Sums and
roundings are those that `mf_train.kernels.lookup` names; the same bits in every run, for any number of threads,
and for AVX2 as for AVX-512.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import build
from .composition import code_dtype

INSTRUCTION_SETS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
}
# -ffp-contract=off: GCC would fuse multiplications and additions that are written apart, differently for each
# instruction set. -Wno-uninitialized: GCC 12's own headers of intrinsics.
FLAGS = [
    "-O3",
    "-std=c++17",
    "-ffp-contract=off",
    "-fPIC",
    "-fopenmp",
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
]

# As csrc/operation.h numbers them.
FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_CODES = {torch.uint8: 0, torch.int16: 1, torch.int32: 2, torch.int64: 3}
_CODE_OUT_OF_RANGE, _NO_MEMORY = 1, 2

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
    "mf_loss_gradient": (None, [_pointer, _int32, *[_pointer] * 3, _int64, _int64, _pointer, _int32]),
}


def library() -> ctypes.CDLL | None:
    """The compiled operations for this machine, built by the first call; None where they cannot be (see `reason`)."""
    return _library_or_reason()[0]


def reason() -> str:
    """Why `library` is None, and what would help; "" where it is not."""
    return _library_or_reason()[1]


@lru_cache(maxsize=1)
def _library_or_reason() -> tuple[ctypes.CDLL | None, str]:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    if capability not in INSTRUCTION_SETS:
        return None, f"this machine offers {capability}; the C++ operation is written for AVX2 and AVX-512"
    try:
        return load(capability), ""
    except build.BuildError as error:
        return None, str(error)


def load(instruction_set: str) -> ctypes.CDLL:
    """The operations compiled for "avx512" or "avx2", which the machine must have.

    Raises:
        build.BuildError: they cannot be compiled or loaded.
    """
    runtime = str(_openmp_runtime())
    sources = sorted(build.SOURCES.glob("*.cpp"))

    def command(output: Path) -> list[str]:
        # Without GCC's default libraries, whose OpenMP runtime would be a second pool of threads beside torch's.
        return [
            *(
                "g++",
                *FLAGS,
                *INSTRUCTION_SETS[instruction_set],
                "-shared",
                *map(str, sources),
                "-o",
                str(output),
            ),
            *("-nodefaultlibs", runtime, "-lstdc++", "-lm", "-lgcc_s", "-lgcc", "-lc"),
        ]

    path = build.compile_once(
        f"cpu-{instruction_set}", [*sources, *sorted(build.SOURCES.glob("*.h"))], command
    )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise build.BuildError(f"{path} cannot be loaded: {error}") from None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def _openmp_runtime() -> Path:
    """The OpenMP library that torch has loaded."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        raise build.BuildError("there is no /proc/self/maps to find torch's OpenMP library in") from None
    for line in maps.splitlines():
        name = line.split(maxsplit=5)[-1]
        if Path(name).name.startswith(("libgomp", "libiomp5")):
            return Path(name)
    raise build.BuildError("torch has loaded no OpenMP library named libgomp or libiomp5")


def _function(name: str) -> Callable[..., int]:
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"the C++ operation is not available: {reason()}")
    return getattr(loaded, name)


def call(name: str, *arguments: Any) -> None:
    """Run an operation on tensors (contiguous; None is a null pointer) and numbers, with torch's number of threads."""
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    if _function(name)(*pointers, torch.get_num_threads()) == _NO_MEMORY:
        raise MemoryError(f"{name}: no scratch memory")


def hash_codes(
    x: Tensor, num_tables: int, temperature: float = 1.0, score: str = "probability"
) -> tuple[Tensor, Tensor]:
    """Codes and weights [..., K] of x [..., D]; see `mf_train.kernels.hash_codes`."""
    x = x.contiguous()
    tau = x.shape[-1] // num_tables
    shape = (*x.shape[:-1], num_tables)
    codes, weights = torch.empty(shape, dtype=code_dtype(tau)), torch.empty(shape, dtype=x.dtype)
    _function("mf_hash")(
        *(x.data_ptr(), FLOATS[x.dtype], weights.numel(), tau, temperature, score != "probability"),
        *(codes.data_ptr(), weights.data_ptr(), torch.get_num_threads()),
    )
    return codes, weights


def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str
) -> Tensor:
    """d x [..., D] from d weights [..., K] and x alone; the weights are computed again."""
    x, d_weights = x.contiguous(), d_weights.to(x.dtype).contiguous()
    dx = torch.empty_like(x)
    _function("mf_hash_backward")(
        *(d_weights.data_ptr(), x.data_ptr(), FLOATS[x.dtype], d_weights.numel(), x.shape[-1] // num_tables),
        *(temperature, score != "probability", dx.data_ptr(), torch.get_num_threads()),
    )
    return dx


def lookup(codes: Tensor, weights: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """y [..., O_i] of each table set [K, 2**tau, O_i]; all read the same codes and weights [..., K].

    Raises:
        ValueError: a code outside [0, 2**tau).
    """
    codes, weights = codes.contiguous(), weights.contiguous()
    tables = [t.contiguous() for t in tables]
    ys = [torch.empty((*codes.shape[:-1], t.shape[2]), dtype=t.dtype) for t in tables]
    status = _function("mf_lookup")(
        *_reads(codes, weights, tables[0]), *_sets(tables), _addresses(ys), torch.get_num_threads()
    )
    _check(status, codes, tables[0])
    return ys


def lookup_backward(
    dys: Sequence[Tensor], codes: Tensor, weights: Tensor, tables: Sequence[Tensor], chunks: int = 1
) -> tuple[Tensor, list[Tensor]]:
    """d weights [..., K] float32, summed over the sets, and d tables of each set, from dy [..., O_i] of each.

    d weights is summed over `chunks` equal chunks of columns, of all sets together, and then over pairs of chunks.

    Raises:
        ValueError: a code outside [0, 2**tau), or 2**31 tokens or more.
    """
    codes, weights = codes.contiguous(), weights.contiguous()
    tables = [t.contiguous() for t in tables]
    dys = [dy.to(t.dtype).contiguous() for dy, t in zip(dys, tables, strict=True)]
    d_weights = torch.empty(weights.shape, dtype=torch.float32)
    d_tables = [torch.empty_like(t) for t in tables]
    if codes.numel() // codes.shape[-1] >= 2**31:
        raise ValueError(f"the backward pass takes fewer than 2**31 tokens, got codes {tuple(codes.shape)}")
    status = _function("mf_lookup_backward")(
        *(_addresses(dys), *_reads(codes, weights, tables[0]), *_sets(tables)),
        *(chunks, d_weights.data_ptr(), _addresses(d_tables), torch.get_num_threads()),
    )
    _check(status, codes, tables[0])
    return d_weights, d_tables


def column_sums(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last: [..., D] -> [D] float32. A column's bits depend on that column alone."""
    x = x.contiguous()
    sums = torch.empty(x.shape[-1], dtype=torch.float32)
    call("mf_column_sums", x, FLOATS[x.dtype], x.shape[:-1].numel(), x.shape[-1], sums)
    return sums


def lookup_int8(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """y [..., O] = sum_k weight_k * scale_k[code_k] * table_k[code_k], in the weights' dtype; for inference.

    tables int8 [K, 2**tau, O], scales float32 [K, 2**tau]. Sums over k in order, in float32.

    Raises:
        ValueError: a code outside [0, 2**tau).
    """
    codes, weights, tables, scales = (t.contiguous() for t in (codes, weights, tables, scales))
    y = torch.empty((*codes.shape[:-1], tables.shape[2]), dtype=weights.dtype)
    status = _function("mf_lookup_int8")(
        *(*_reads(codes, weights, tables), tables.data_ptr(), tables.shape[2], scales.data_ptr()),
        *(y.data_ptr(), torch.get_num_threads()),
    )
    _check(status, codes, tables)
    return y


def count_codes(codes_nk: Tensor, counts: Tensor) -> None:
    """Add codes [N, K], whose last dimension lies in one piece, to counts int64 [K, rows], contiguous.

    Raises:
        ValueError: a code outside [0, rows); the counts are then of no use any more.
    """
    status = _function("mf_count")(
        *(codes_nk.data_ptr(), _CODES[codes_nk.dtype], len(codes_nk), codes_nk.stride(0)),
        *(*counts.shape, counts.data_ptr(), torch.get_num_threads()),
    )
    _check(status, codes_nk, counts)


def _reads(codes: Tensor, weights: Tensor, tables: Tensor) -> tuple[int, ...]:
    num_tables, rows, _ = tables.shape
    return (
        *(codes.data_ptr(), _CODES[codes.dtype], weights.data_ptr(), FLOATS[weights.dtype]),
        *(codes.numel() // num_tables, num_tables, rows),
    )


def _sets(tables: Sequence[Tensor]) -> tuple[Any, ...]:
    columns = (_int64 * len(tables))(*[t.shape[2] for t in tables])
    return len(tables), _addresses(tables), columns, FLOATS[tables[0].dtype]


def _addresses(tensors: Sequence[Tensor]) -> Any:
    return (_pointer * len(tensors))(*[t.data_ptr() for t in tensors])


def _check(status: int, codes: Tensor, tables: Tensor) -> None:
    if status == _CODE_OUT_OF_RANGE:
        raise ValueError(
            f"codes must be in [0, {tables.shape[1]}) for tables of shape {tuple(tables.shape)}, "
            f"got codes from {codes.min()} to {codes.max()}"
        )
    if status == _NO_MEMORY:
        raise MemoryError(f"no scratch memory for codes {tuple(codes.shape)}, tables {tuple(tables.shape)}")
