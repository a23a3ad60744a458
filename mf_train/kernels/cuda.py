"""The lookup's forward in CUDA C++ for compute capability 9.0 (H100, H200): rows served from shared memory.

Compiled on request by nvcc, called through ctypes; everything but the forward is Triton's.

The design. A thread block owns 128 bytes of every row (64 bfloat16 columns) and M = 768 tokens, whose float32 sums
stay in the registers of 384 threads: 8 lanes hold a token's columns, and each thread does this for 16 tokens. It
goes through the tables in order. A table's slice, 2**tau such row segments, comes by a bulk tensor copy (a box of a
tensor map: one instruction for up to 256 strided rows, zeros past column O) and is read from shared memory by all
768 tokens; 6 stages (tau 8) with an mbarrier pair each keep copies ahead of the sums. Blocks of a cluster have other
tokens and the same columns, and multicast their shares of each slice to one another. A small kernel first rewrites
codes and weights [N, K] as one word each, [K, N]: the row's offset in the slice and the weight; there a code
outside the table becomes row 0 with weight NaN, so that nothing outside is read and the token's output is NaN. For
10 bits rows are 64 bytes and M is 1536; larger tables do not fit. Fewer tokens get smaller tiles (`make_plan`).

What to expect for D = O = 1024, tau 8, bfloat16, many tokens on an H100 (132 multiprocessors at about 1.75 GHz, 128
bytes a clock of shared memory). Counted, NOT measured: no GPU was at hand. A token reads 128 tables x 16 column
blocks = 2048 row segments of 128 bytes, 256 KiB; 1 clock of one multiprocessor each is 8.9 ns a token.

| bound | clocks per row segment | ns per token |
|---|---|---|
| shared memory, rows alone | 1 | 8.9 |
| with the entries (1 to 4 clocks per 16) and the slice's own arrival (256 clocks per 768) | 1.4 to 1.6 | 12.4 to 14 |
| instruction issue: 5.5 of a warp per segment, 4 a clock | 1.4 | 12.2 |
| L2: 32 KiB per 768 tokens (half of that in clusters of 2), at 5.5 TB/s | 1.8 (0.9) | 16 (8) |
| HBM: all tables once per call, 67 MB at 3 TB/s, for 16384 tokens | | 1.4 |

So 12 ns is the floor of this design. The blocks fill the GPU in whole waves, with which the same counts give 24, 15 and
14 ns for N = 2048, 16384 and 65536, if issue and shared memory overlap perfectly; they will not quite. It always
reads the whole tables: below about 2**tau tokens, as in decoding, Triton, which reads only the rows hit, is the one to
use. The issue count is of the machine code: for 4 row segments a warp issues 1 load of 16 bytes per lane, 1 address,
1 weight, 8 conversions (a shift or a mask each, exact) and 8 FFMA; waits and counters add a seventh. Packed bfloat16
arithmetic (HFMA2) would need no conversions but rounds every step to 8 bits, and tensor cores do not round sums to
nearest. A product of bfloat16 values is exact in float32, so the sums here are bit for bit those of any float32 sum
in k's order. Reading 16 bytes per lane, 8 lanes on one 128-byte row, has no bank conflicts; 64-byte rows (10 bits)
do: two random rows share banks half of the time.
"""

import ctypes
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .build import SOURCES, BuildError, UnsupportedError, compile_once
from .composition import Sum, add_biases

CAPABILITY = (9, 0)
MAX_BITS = 10
ROW_ALIGNMENT = 16  # bytes: of a table's start and of each of its rows, as bulk tensor copies need them
DTYPES = (torch.bfloat16, torch.float32)
CODE_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)

# sm_90a, not sm_90: there a multicast copy is slow, says the assembler.
FLAGS = ["-shared", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-Wall,-Wextra"]
FLAGS += ["-gencode=arch=compute_90a,code=sm_90a"]

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_sizes = [_int64, _int64, _int]  # tokens, tables, bits
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "mf_lookup_sm90_entry_bytes": (_int64, [_int64, _int64, _int]),
    "mf_lookup_sm90_pack": (_int, [_pointer, _int, _pointer, _int, _pointer, *_sizes, _int, _pointer]),
    "mf_lookup_sm90": (_int, [_pointer, _pointer, _int, _pointer, *_sizes, _int64, _int, _pointer]),
    "mf_lookup_sm90_error": (ctypes.c_char_p, [_int]),
}


def find_nvcc() -> str | None:
    """nvcc from the PATH, or from where CUDA installs itself."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def unavailable_reason(device: torch.device | None = None) -> str:
    """Why the kernel cannot run on `device` (by default the current GPU); "" where it can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"the kernel is for compute capability 9.0, and this GPU has {capability[0]}.{capability[1]}"
    return "" if find_nvcc() else "nvcc is not on the PATH"


def is_available() -> bool:
    """Whether the current GPU can run the kernel and nvcc is there to compile it."""
    return not unavailable_reason()


def build() -> Path:
    """The library, compiled by the first call (a few seconds) and kept in the user's cache folder.

    Raises:
        BuildError: nvcc is missing or fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("nvcc is not on the PATH; install the CUDA toolkit (12.3 or later)")
    source = SOURCES / "lookup_sm90.cu"
    return compile_once(
        "lookup_sm90",
        [source, SOURCES / "lookup_sm90.h"],
        FLAGS,
        lambda output: [[[nvcc, *FLAGS, str(source), "-o", str(output)]]],
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def unsupported_reason(codes: Tensor, weights: Tensor, tables: Sequence[Tensor]) -> str:
    """What about the arguments the kernel does not take, wherever they are; "" for nothing."""
    if codes.dtype not in CODE_DTYPES:
        return f"codes are {codes.dtype}"
    for i, table in enumerate(tables):
        num_tables, rows, columns = table.shape
        if table.dtype not in DTYPES or table.dtype != tables[0].dtype:
            return f"tables[{i}] is {table.dtype}; bfloat16 and float32 are possible, one for all"
        if not 2 <= rows <= 2**MAX_BITS:
            return f"tables[{i}] has {rows} rows, which do not fit in shared memory; {2**MAX_BITS} do"
        if num_tables * rows >= 2**31 or columns >= 2**31:
            return f"tables[{i}] of shape {tuple(table.shape)} has 2**31 rows or columns, or more"
        if columns * table.element_size() % ROW_ALIGNMENT:
            return f"tables[{i}] has rows of {columns} {table.dtype}, not a multiple of {ROW_ALIGNMENT} bytes"
        if not table.is_contiguous() or table.data_ptr() % ROW_ALIGNMENT:
            return f"tables[{i}] is not contiguous from a multiple of {ROW_ALIGNMENT} bytes on"
        if not codes.device == weights.device == table.device:
            return f"tables[{i}] is on {table.device}, codes on {codes.device}, weights on {weights.device}"
    return ""


def supports(codes: Tensor, weights: Tensor, tables: Sequence[Tensor]) -> bool:
    """Whether `lookup` takes these arguments, on the device that they are on."""
    if codes.device.type != "cuda" or unavailable_reason(codes.device):
        return False
    return not unsupported_reason(codes, weights, tables)


def lookup(
    codes: Tensor, weights: Tensor, tables: Sequence[Tensor], biases: Sequence[Tensor] = ()
) -> list[Tensor]:
    """y [..., O_i] of each table set [K, 2**tau, O_i], summed in float32 over k in order, on the current stream.

    `biases` [O_i], of each set or of none, are added to what was rounded.
    A token with a code outside its table gets NaN. An infinity or NaN in a row reaches the tokens that read it.

    Raises:
        UnsupportedError: arguments that the kernel does not take, with what to use instead.
        BuildError: it could not be compiled.
        RuntimeError: CUDA failed, in its words.
    """
    problem = unsupported_reason(codes, weights, tables)
    if not problem and codes.device.type != "cuda":
        problem = f"the tensors are on {codes.device}"
    problem = problem or unavailable_reason(codes.device)
    if problem:
        raise UnsupportedError(f"backend 'cuda' cannot look this up: {problem}; use backend='triton'")
    library = _library()
    num_tables, rows, _ = tables[0].shape
    value_bytes = tables[0].element_size()
    device = codes.device
    codes_nk = codes.reshape(-1, num_tables).contiguous()
    weights_nk = weights.reshape(-1, num_tables).to(tables[0].dtype).contiguous()
    sizes = (codes_nk.shape[0], num_tables, rows.bit_length() - 1)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        bytes_needed = library.mf_lookup_sm90_entry_bytes(*sizes[:2], value_bytes)
        entries = torch.empty(bytes_needed, dtype=torch.uint8, device=device)
        _check(
            library.mf_lookup_sm90_pack(
                codes_nk.data_ptr(),
                codes_nk.element_size(),
                weights_nk.data_ptr(),
                value_bytes,
                entries.data_ptr(),
                *sizes,
                device.index,
                stream,
            )
        )
        ys = []
        for table in tables:
            y = table.new_empty((*codes.shape[:-1], table.shape[-1]))
            _check(
                library.mf_lookup_sm90(
                    entries.data_ptr(),
                    table.data_ptr(),
                    value_bytes,
                    y.data_ptr(),
                    *sizes,
                    table.shape[-1],
                    device.index,
                    stream,
                )
            )
            ys.append(y)
    return add_biases(ys, biases)


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA error {status}: {_library().mf_lookup_sm90_error(status).decode()}")


def _triton() -> ModuleType:
    from . import triton_backend

    return triton_backend


def hash_codes(x: Tensor, num_tables: int, temperature: float, score: str) -> tuple[Tensor, Tensor]:
    """Triton's."""
    result: tuple[Tensor, Tensor] = _triton().hash_codes(x, num_tables, temperature, score)
    return result


def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str
) -> Tensor:
    """Triton's."""
    dx: Tensor = _triton().hash_codes_backward(d_weights, x, num_tables, temperature, score)
    return dx


def lookup_backward(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    chunks: int = 1,
    sums: Sequence[Sum] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Triton's."""
    result: tuple[Tensor, list[Tensor]] = _triton().lookup_backward(dys, codes, weights, tables, chunks, sums)
    return result


def column_sums(x: Tensor) -> Tensor:
    """Triton's."""
    sums: Tensor = _triton().column_sums(x)
    return sums


def lookup_int8(codes: Tensor, weights: Tensor, tables: Tensor, scales: Tensor) -> Tensor:
    """Triton's."""
    y: Tensor = _triton().lookup_int8(codes, weights, tables, scales)
    return y
