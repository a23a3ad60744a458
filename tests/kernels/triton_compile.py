"""Compiles every Triton kernel for an H100, without one: `python triton_compile.py ELEMENT CODES`, such as bf16 u8.

`test_triton` runs it. The launches are those of usual sizes: aligned tensors and multiples of 16. With capabilities
behind (80 90 100) it prints what ptxas says of each kernel for these.
"""

import itertools
import os
import re
import subprocess
import sys
from tempfile import NamedTemporaryFile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mf_train.kernels import (
    triton_adamw,
    triton_blocks,
    triton_grouping,
    triton_hash,
    triton_lookup,
    triton_lookup_backward,
    triton_loss,
    triton_norm,
    triton_rotary,
    triton_sums,
)
from mf_train.kernels.adamw import Draw, Rates

H100 = GPUTarget("cuda", 90, 32)
shown: list[int] = []  # capabilities whose registers are printed
ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}
BITS = {"u8": 8, "i16": 10, "i32": 16, "i64": 1}  # of the tables that are read by codes of each type
NUM_TABLES, COLUMNS = 128, 1024


def compile_kernel(
    kernel: Any, pointers: dict[str, str], integers: list[str], num_warps: int, constants: dict[str, Any]
) -> dict[str, str]:
    """What came of the kernel, among it its PTX, which ptxas took. `constants` may name more than the kernel has: also
    options. Pointers that are not named are None.
    """
    signature = {name: "constexpr" for name in kernel.arg_names}
    pointers = {name: kind for name, kind in pointers.items() if f"{name}_ptr" in kernel.arg_names}
    signature |= {f"{name}_ptr": "*" + element for name, element in pointers.items()}
    signature |= {
        name: "u1" if name.startswith("add") else "i32" for name in integers if name in kernel.arg_names
    }
    signature |= {
        name: "fp32" for name in ("keep", "rate", "root_of_share", "inverse_cap") if name in signature
    }
    aligned = [*(f"{name}_ptr" for name in pointers), "out_features", "first_column", "chunk", "width"]
    aligned += ["vocabulary"]
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned
    }
    values = {name: value for name, value in constants.items() if name in kernel.arg_names}
    missing = [name for name in kernel.arg_names if name.endswith("_ptr") and name[:-4] not in pointers]
    values |= dict.fromkeys(missing)
    source = ASTSource(kernel, signature, values, attributes)
    fusion = constants.get("enable_fp_fusion", True)
    options = {"num_warps": num_warps, "enable_fp_fusion": fusion}
    for capability in shown:
        target = GPUTarget("cuda", capability, 32)
        ptx = triton.compile(source, target=target, options=options).asm["ptx"]
        print(kernel.fn.__name__, constants, f"sm_{capability}:", registers(ptx, capability), flush=True)
    compiled = triton.compile(source, target=H100, options=options)
    assert compiled.asm["cubin"]
    return compiled.asm


def registers(ptx: str, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    name = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    with NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={name}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return ", ".join(re.findall(r"\d+ registers|\d+ bytes spill stores", said))


def wide_loads(ptx: str) -> int:
    """Loads of 16 bytes a lane."""
    return len(re.findall(r"ld\.global\.(v4\.b32|v2\.b64)", ptx))


def compile_hash(element: str, codes: str, common: dict[str, Any]) -> None:
    constants = {**common, "BLOCK": triton_hash.BLOCK, "SCALED": True}
    pointers = {"x": element, "codes": codes, "weights": element}
    compile_kernel(triton_hash._hash_kernel, pointers, ["num_chunks"], 4, constants)
    pointers = {"d_weights": element, "x": element, "dx": element}
    compile_kernel(triton_hash._hash_backward_kernel, pointers, ["num_chunks"], 4, constants)


def compile_forward(element: str, codes: str, common: dict[str, Any]) -> None:
    pointers = dict.fromkeys(("weights", "tables", "bias", "y"), element) | {"codes": codes}
    for num_tokens in (1, 16384):
        tokens, block, unroll = triton_blocks.forward_blocks(
            num_tokens, NUM_TABLES, common["ROWS"], COLUMNS, ITEM_BYTES[element]
        )
        constants = {**common, "TOKENS": tokens, "BLOCK": block, "UNROLL": unroll}
        sizes = ["num_tokens", "out_features"]
        ptx = compile_kernel(triton_lookup._forward_kernel, pointers, sizes, 1, constants)["ptx"]
        assert num_tokens == 1 or wide_loads(ptx) >= unroll, "rows are not read 16 bytes a lane"
    int8 = {**pointers, "tables": "i8", "scales": "fp32"}
    del int8["bias"]
    compile_kernel(triton_lookup._forward_kernel, int8, sizes, 1, constants)


def compile_backward(element: str, codes: str, common: dict[str, Any]) -> None:
    total = "fp64" if element == "fp64" else "fp32"
    pointers = {"dy": element, "weights": element, "codes": codes, "tokens": "i32", "ends": "i32"}
    pointers |= {"tables": element, "d_tables": element, "d_weights": total, "parts": total, "sums": total}
    sizes = ["num_tokens", "num_slots", "num_reads", "out_features", "first_column", "chunk", "all_chunks"]
    sizes += ["width", "add", "add_tables"]
    for segments, chunks in itertools.product((False, True), (1, 8)):
        pointers["d_tables"] = element if chunks == 1 else total  # alone, or in a sum
        block, beside, unroll, rows = triton_blocks.backward_blocks(
            16384, common["ROWS"], COLUMNS, chunks, ITEM_BYTES[element]
        )
        constants = {**common, "BLOCK": block, "UNROLL": unroll, "ROWS_PER_PROGRAM": rows}
        constants |= {"CHUNKS": beside, "SEGMENT": triton_lookup_backward.SEGMENT}
        kernel = (
            triton_lookup_backward._segments_kernel if segments else triton_lookup_backward._backward_kernel
        )
        ptx = compile_kernel(kernel, pointers, sizes, 1, constants)["ptx"]
        if block * ITEM_BYTES[element] >= triton_blocks.WARP_BYTES:
            assert wide_loads(ptx) >= unroll, "rows are not read 16 bytes a lane"
    constants = {**common, "CHUNKS": 8, "BLOCK": triton_lookup_backward.FINISHED}
    compile_kernel(triton_lookup_backward._finish_kernel, pointers, ["num_tokens"], 4, constants)


def compile_grouping(codes: str, common: dict[str, Any]) -> None:
    constants = {**common, "CHUNK": triton_grouping.CHUNK, "BLOCK": triton_grouping.BLOCK}
    sizes = ["num_tokens", "num_chunks"]
    compile_kernel(triton_grouping._count_kernel, {"codes": codes, "counts": "i32"}, sizes, 4, constants)
    constants |= {"CHUNK": max(triton_grouping.CHUNK, common["ROWS"])}
    constants |= {"CHUNKS": max(triton_grouping.SCANNED // common["ROWS"], 1)}
    pointers = {"counts": "i32", "ends": "i32"}
    compile_kernel(triton_grouping._scan_kernel, pointers, ["num_chunks"], 8, constants)
    pointers = {"codes": codes, "earlier": "i32", "ends": "i32", "tokens": "i32"}
    compile_kernel(triton_grouping._place_kernel, pointers, sizes, 4, constants)


def sum_layouts(compiled: dict[str, str]) -> set[str]:
    """How the threads hold each tensor that is summed, which is the order of its sum."""
    text = compiled["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    summed = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<(\S+), (#\w+)>\)', text, re.DOTALL)
    assert summed
    return {f"{shape} {layouts[name]}" for shape, name in summed}


def compile_norm(element: str) -> None:
    """The kernels of a LayerNorm of COLUMNS features, whole and on 8 ranks: a chunk is summed in one order by all."""
    chunk = COLUMNS // 8
    given = {name: element for name in ("x", "dy", "weight", "bias", "y", "dx")}
    given |= {name: "fp32" for name in ("sums", "mean", "rstd", "parts")}
    kernels = [
        triton_norm._moments_kernel,
        triton_norm._normalise_kernel,
        triton_norm._gradient_sums_kernel,
        triton_norm._gradients_kernel,
    ]
    orders = set()
    for kernel, ranks in itertools.product(kernels, (1, 8)):
        constants = triton_norm.constants(COLUMNS // ranks, chunk)
        constants |= {"CENTRED": True, "EPSILON": 1e-5, "RANKS": ranks}
        pointers = {name: kind for name, kind in given.items() if f"{name}_ptr" in kernel.arg_names}
        sums_itself = kernel in kernels[::2] or ranks == 1
        if ranks == 1 and kernel in kernels[1::2]:
            del pointers["sums"]
        compiled = compile_kernel(kernel, pointers, ["num_tokens"], constants["num_warps"], constants)
        assert wide_loads(compiled["ptx"]) >= 8 // ranks, "x is not read 16 bytes a lane"
        assert not re.search(r"\bfma\.", compiled["ptx"]), "a product is fused into a sum"
        if sums_itself:
            orders |= sum_layouts(compiled)
    assert len(orders) == 1, f"a chunk's sum has an order of its own in some kernel: {orders}"


def compile_sums(element: str, common: dict[str, Any]) -> None:
    constants = {**common, "ROWS": triton_sums.ROWS, "COLUMNS": triton_sums.COLUMNS}
    pointers = {"x": element, "sums": "fp64" if element == "fp64" else "fp32"}
    compile_kernel(triton_sums._fold_kernel, pointers, ["num_rows", "num_columns"], 4, constants)


def compile_loss(element: str) -> None:
    vocabulary, warps = 50304, triton_loss.NUM_WARPS
    constants = {"LOWEST": triton_loss.LOWEST, "BLOCK": triton_loss.block(vocabulary // 8)}
    pointers = {"logits": element, "target": "i64", "sums": "fp32"}
    compiled = compile_kernel(triton_loss._sums_kernel, pointers, ["num_chunks", "chunk"], warps, constants)
    assert wide_loads(compiled["ptx"]) >= 2, "logits are not read 16 bytes a lane"
    pointers = {"logits": element, "normaliser": "fp32", "factor": "fp32", "target": "i64", "out": element}
    for capped in (False, True):
        constants["CAPPED"] = capped
        compiled = compile_kernel(triton_loss._gradient_kernel, pointers, ["vocabulary"], warps, constants)
        assert wide_loads(compiled["ptx"]) >= 2, "logits are not read 16 bytes a lane"


def compile_rotary(element: str) -> None:
    pointers = dict.fromkeys(("q", "k", "turned_q", "turned_k"), element) | {"cosine": "fp32", "sine": "fp32"}
    for back in (False, True):
        constants = {**triton_rotary.constants(16, 64, 8), "BACK": back}
        sizes = ["num_rows", "num_positions"]
        compiled = compile_kernel(triton_rotary._rotate_kernel, pointers, sizes, 4, constants)
        assert wide_loads(compiled["ptx"]) >= 2, "what does not turn is not read 16 bytes a lane"


def compile_adamw() -> None:
    rates, draw = Rates.of_step(1e-3, 0.1, (0.9, 0.95), 1e-8, 1), Draw(0, 0, 0, 8, 8, 0)
    pointers = {
        "gradient": "fp32",
        "master": "bf16",
        "master_rest": "i16",
        "first": "i8",
        "first_rest": "fp32",
    }
    for second in ({"second": "u8", "second_rest": "fp32"}, {"second": "fp32"}):
        kind = "int8" if len(second) == 2 else "row"
        constants = triton_adamw.constants(64, "split", "int8", kind, rates, draw)
        sizes = ["num_units", "low", "high", "begin"]
        kernel = triton_adamw._adamw_kernel
        ptx = compile_kernel(kernel, pointers | second, sizes, constants["num_warps"], constants)["ptx"]
        assert wide_loads(ptx) >= 1, "gradients are not read 16 bytes a lane"


def main(element: str, codes: str, *capabilities: str) -> None:
    shown.extend(map(int, capabilities))
    tau = BITS[codes]
    common = {"SUM": tl.float64 if element == "fp64" else tl.float32, "ROWS": 2**tau, "K": NUM_TABLES}
    common |= {"TAU": tau, "PADDED_TAU": triton.next_power_of_2(tau), "SLOPE": -2.0}
    compile_hash(element, codes, common)
    compile_forward(element, codes, common)
    compile_backward(element, codes, common)
    compile_sums(element, common)
    if element != "fp64":
        compile_norm(element)
    if 2**tau <= triton_grouping.MAX_COUNTED_ROWS:
        compile_grouping(codes, common)
    if element != "fp64":  # which torch operations compute
        compile_loss(element)
        compile_rotary(element)
    if element == "bf16":
        compile_adamw()


if __name__ == "__main__":
    main(*sys.argv[1:])
