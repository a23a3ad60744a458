"""Decoding through transformers' `generate`: a MemoryFormer and the dense GPT-NeoX of its peer's shape, random weights.

    python -m benchmarks.decode [--models tiny,base] [--dtype bfloat16,int8] [--cases 1x64,8x64,1x512] [--save]

Each case is BATCH x PROMPT tokens, then 64 new ones, greedily. Models take turns in one process. A model's folder is
what `memoryformer convert` would write, in a temporary folder: base takes 13.3 GB of disk and page cache in bfloat16.
Tables repeat one block of 2^20 normal values at shifting offsets: every row is a place of its own in memory, which is
all that the time depends on.
"""

import argparse
import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import report
from benchmarks.tables import table
from mf_train.checkpoint.safetensors_file import FileLayout, bytes_of
from mf_train.config import Config, ModelConfig
from mf_train.doctor.timing import copy_bandwidth
from mf_train.model import MemoryFormer
from mf_train.model.quantized import use_int8
from mf_train.standalone.conversion.settings_files import settings_files
from mf_train.standalone.conversion.source_files import source_files
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import SINGLE

NEW = 64
MODELS = {
    "tiny": ModelConfig(hidden_size=512, num_layers=6, num_heads=8),
    "small": ModelConfig(hidden_size=768, num_layers=12, num_heads=12),
    "base": ModelConfig(hidden_size=1024, num_layers=24, num_heads=16),
}
PEERS = {"tiny": "Pythia-70M", "small": "Pythia-160M", "base": "Pythia-410M"}
STD = 0.02


def write_folder(folder: Path, config: ModelConfig, dtype: str) -> None:
    """A converted model of random weights."""
    texts = settings_files(Config(model=config), dtype, 0) | source_files()
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    with torch.device("meta"):
        model = MemoryFormer(config).bfloat16()
        if dtype == "int8":
            use_int8(model)
    state = sorted(model.state_dict().items(), key=lambda item: -item[1].nbytes)
    block = torch.randn(2**20 + 7, generator=torch.Generator().manual_seed(0)) * STD
    shapes = {PARAMETER_PREFIX + name: (tensor.dtype, tensor.shape) for name, tensor in state}
    with (folder / SINGLE).open("wb") as file:
        file.write(FileLayout(shapes, {"format": "pt"}).header)
        for name, tensor in state:
            left = tensor.numel()
            values = _values(name, tensor.dtype, block)
            while left:
                part = values[: min(left, len(values))]
                file.write(bytes_of(part.contiguous()))
                left -= len(part)


def forget(path: Path) -> None:
    """Put a file on the disk and out of the page cache: it is to be read as a file of another day is.

    Else the disk writes during the first steps, and pages stay in the cache as they were written, singly: reading
    brings large ones, with fewer misses of the TLB later.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _values(name: str, dtype: torch.dtype, block: Tensor) -> Tensor:
    """Values that a parameter repeats."""
    if name.endswith("scales"):
        return torch.full_like(block, STD * 3 / 127)
    if "norm" in name:
        return torch.full_like(block, float(name.endswith("weight")), dtype=dtype)
    if dtype == torch.int8:
        return (block * (127 / (3 * STD))).round_().clamp_(-127, 127).to(dtype)
    return torch.zeros_like(block, dtype=dtype) if name.endswith("bias") else block.to(dtype)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def dense_peer(config: ModelConfig) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    settings = GPTNeoXConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=4 * config.hidden_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.sequence_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    return GPTNeoXForCausalLM(settings).bfloat16().eval()


def run(model: Any, prompt: Tensor, new: int = NEW) -> tuple[float, float]:
    """Seconds until the first new token, and from it to the last of `new`."""
    times: list[float] = []

    def note(*_: Any) -> Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)

    start = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        stopping_criteria=[note],
    )
    return times[0] - start, times[-1] - times[0]


def bytes_per_token(config: ModelConfig, dtype: str, batch: int, length: float) -> float:
    """Read at one step: rows or matrices, LM head, keys and values of `length` positions."""
    size, width = config.hidden_size, 1 if dtype == "int8" else 2
    cache = batch * length * 2 * config.num_layers * size * 2
    if dtype == "dense":
        return 2 * (12 * size**2 * config.num_layers + config.vocab_size * size) + cache
    row_bytes = (4 * size + config.inner_size) * width + (5 * 4 if dtype == "int8" else 0)
    rows = batch * config.num_tables * config.num_layers * row_bytes
    return rows + config.vocab_size * (size * width + (4 if dtype == "int8" else 0)) + cache


def measure(
    name: str, dtype: str, cases: list[tuple[int, int]], repeats: int, bandwidth: float
) -> list[list[str]]:
    """Rows of the table for one model and dtype."""
    config = MODELS[name]
    folder = Path(tempfile.mkdtemp(prefix=f"memoryformer-{name}-"))
    rows = []
    try:
        print(f"writing {name} in {dtype} to {folder}", file=sys.stderr, flush=True)
        write_folder(folder, config, dtype)
        forget(folder / SINGLE)
        models = {"ours": load(folder), "dense": dense_peer(config)}
        for batch, prompt_length in cases:
            prompt = torch.randint(1, config.vocab_size, (batch, prompt_length))
            seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in models}
            for model in models.values():
                run(model, prompt, 8)
            for _ in range(repeats):
                for kind, model in models.items():
                    seconds[kind].append(run(model, prompt))
            assert models["ours"]._fast_path._decoder is not None, "the fast path was not taken"
            rows.append(_row(name, dtype, batch, prompt_length, seconds, bandwidth))
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(folder)
    models.clear()
    gc.collect()
    return rows


def _row(
    name: str,
    dtype: str,
    batch: int,
    prompt: int,
    seconds: dict[str, list[tuple[float, float]]],
    bandwidth: float,
) -> list[str]:
    config, length = MODELS[name], prompt + NEW / 2
    step = {kind: statistics.median(pair[1] for pair in pairs) / (NEW - 1) for kind, pairs in seconds.items()}
    first = {kind: statistics.median(pair[0] for pair in pairs) for kind, pairs in seconds.items()}
    whole = {kind: statistics.median(map(sum, pairs)) for kind, pairs in seconds.items()}
    read = {
        kind: bytes_per_token(config, dtype if kind == "ours" else "dense", batch, length) for kind in step
    }
    return [
        f"{name} {dtype} {batch} x {prompt}",
        f"{batch / step['ours']:.0f}",
        f"{batch / step['dense']:.0f}",
        f"{step['dense'] / step['ours']:.2f}",
        f"{read['dense'] / read['ours']:.2f}",
        f"{read['ours'] / 1e6:.0f}",
        f"{read['ours'] / step['ours'] / bandwidth:.0%}",
        f"{read['dense'] / step['dense'] / bandwidth:.0%}",
        f"{first['ours'] * 1e3:.0f}",
        f"{first['dense'] * 1e3:.0f}",
        f"{whole['dense'] / whole['ours']:.2f}",
    ]


HEADER = (
    *("model, batch x prompt", "tokens/s", "dense", "ratio", "bytes allow", "MB a step", "of copy", "dense"),
    *("prompt ms", "dense", "ratio with prompt"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--models", default="tiny,base")
    parser.add_argument(
        "--dtype", default="bfloat16,int8", help="of the MemoryFormer; the dense peer's is bfloat16"
    )
    parser.add_argument("--cases", default="1x64,8x64,1x512", help="BATCHxPROMPT,...")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="also write benchmarks/results/DATE-decode.txt")
    options = parser.parse_args()
    cases = [
        (int(batch), int(length)) for batch, length in (case.split("x") for case in options.cases.split(","))
    ]
    bandwidth = copy_bandwidth()
    rows = []
    for name in options.models.split(","):
        for dtype in options.dtype.split(","):
            rows += measure(name, dtype, cases, options.repeats, bandwidth)
    peers = ", ".join(f"{name}: {PEERS[name]}'s shape" for name in options.models.split(","))
    notes = (
        f"Copy bandwidth {bandwidth / 1e9:.1f} GB/s, read and written. {NEW} new tokens through transformers' generate,"
        f" greedy; medians of {options.repeats}.\nDense peers ({peers}) are GPT-NeoX in bfloat16. tokens/s count from "
        "the first new token on; the last three columns are about the prompt and the whole call."
    )
    report("decode", [notes, table(HEADER, rows)], save=options.save)


if __name__ == "__main__":
    main()
