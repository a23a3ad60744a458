"""Lookups on a GPU: checked against float64, then timed against embedding_bag, the dense product and the memory.

    python -m benchmarks.gpu [--hidden 512 1024 2048] [--tokens 2048 16384 65536] [--train] [--sweep]

Needs torch for CUDA and triton, nothing else; `python benchmarks/gpu.py` in a checkout is the same. bfloat16, tau 8,
D = O, K = D / 8 tables. Times are the device's, medians; calls go round copies of their arguments larger than the L2
cache, so that tables come from memory, as in training. The last output is one table.

The lines count K O b bytes a token over a bandwidth. Memory: a copy's, measured here. L2: given, 5.5 TB/s for an H100,
with a copy inside L2 measured beside it. Shared memory: 128 bytes a clock and multiprocessor at 1.755 GHz, given.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where this file is run as a script

from mf_train.kernels import composition, cuda, reference

TAU = 8
DTYPE = torch.bfloat16
L2_BYTES_A_SECOND = 5.5e12  # of an H100: given, not measured
CLOCK = 1.755e9  # an H100's under load: given
ROTATION_BYTES = 256 * 2**20  # several times any L2 cache
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Call = Callable[[], object]


def measure(calls: list[Call], seconds: float = 0.2) -> float:
    """Median seconds that the device takes for a call, calling each of `calls` in turn."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    estimate = _elapsed([calls[0]])[0]
    repeats = min(max(int(seconds / max(estimate, 1e-6)), 7), 100)
    return statistics.median(_elapsed(list(itertools.islice(itertools.cycle(calls), repeats))))


def _elapsed(calls: list[Call]) -> list[float]:
    """Seconds of each call. The device sleeps first, so that it never waits for Python between two events."""
    torch.cuda._sleep(int(5e-4 * CLOCK * (len(calls) + 5)))
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    for call in calls:
        call()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second, read plus written, of copying `num_bytes` again and again."""
    source = torch.ones(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * num_bytes / measure([lambda: target.copy_(source)])


class Layer:
    """Random arguments of one memory layer, and of the dense one that it replaces."""

    def __init__(self, hidden: int, tokens: int, seed: int, dtype: torch.dtype = DTYPE) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

        self.num_tables = hidden // TAU
        self.x, self.dy = normal(tokens, hidden), normal(tokens, hidden)
        self.tables = normal(self.num_tables, 2**TAU, hidden)
        self.codes, self.weights = composition.hash_codes(self.x, self.num_tables)
        self.d_weights = normal(tokens, self.num_tables)
        self.dense = normal(hidden, hidden)
        first_row = torch.arange(self.num_tables, device="cuda", dtype=torch.int32) * 2**TAU
        self.rows = self.codes.to(torch.int32) + first_row

    def embedding_bag(self, tables: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(self.rows, tables.flatten(0, 1), per_sample_weights=weights, mode="sum")

    def embedding_bag_backward(self) -> Call:
        """Its backward pass alone, which keeps the graph."""
        leaves = [self.tables.detach().requires_grad_(), self.weights.detach().requires_grad_()]
        y = self.embedding_bag(*leaves)
        return lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)


def check(triton_backend: ModuleType, with_cuda: bool) -> None:
    """Every kernel against float64, gradients included; stops at the first that is wrong."""
    shapes = [(512, 600, torch.float32), (512, 600, torch.bfloat16), (320, 77, torch.float16)]
    for hidden, tokens, dtype in shapes:
        layer = Layer(hidden, tokens, seed=hidden + tokens, dtype=dtype)
        x, weights, tables = (t.double().requires_grad_() for t in (layer.x, layer.weights, layer.tables))
        true_codes, true_weights = reference.hash_codes(x, layer.num_tables)
        (true_dx,) = torch.autograd.grad(true_weights, x, layer.d_weights.double())
        true_y = reference.lookup(layer.codes, weights, tables)
        true_d_weights, true_d_tables = torch.autograd.grad(true_y, (weights, tables), layer.dy.double())

        settings = (layer.num_tables, 1.0, "probability")
        codes, hashed = triton_backend.hash_codes(layer.x, *settings)
        if not torch.equal(codes, true_codes):
            raise SystemExit(f"wrong: Triton's codes, {dtype}")
        dx = triton_backend.hash_codes_backward(layer.d_weights, layer.x, *settings)
        lookup = (layer.codes, layer.weights, [layer.tables])
        d_weights, (d_tables,) = triton_backend.lookup_backward([layer.dy], *lookup)
        found = {
            "Triton's weights": (hashed, true_weights),
            "Triton's dx": (dx, true_dx),
            "Triton's y": (triton_backend.lookup(*lookup)[0], true_y),
            "Triton's d weights": (d_weights, true_d_weights),
            "Triton's d tables": (d_tables, true_d_tables),
        }
        if with_cuda and cuda.supports(*lookup):
            found["CUDA's y"] = (cuda.lookup(*lookup)[0], true_y)
        for name, (actual, expected) in found.items():
            error = float((actual.double() - expected).detach().abs().max() / expected.detach().abs().max())
            if not error <= TOLERANCE[dtype]:
                raise SystemExit(f"wrong: {name}, {dtype}: relative error {error:.2g}")
        print(f"checked against float64: D = O = {hidden}, {tokens} tokens, {dtype}: {', '.join(found)}")


def triton_steps(triton_backend: ModuleType) -> dict[str, Callable[[Layer], Call]]:
    lookup, backward = triton_backend.lookup, triton_backend.lookup_backward
    return {
        "triton": lambda a: lambda: lookup(a.codes, a.weights, [a.tables]),
        "triton backward": lambda a: lambda: backward([a.dy], a.codes, a.weights, [a.tables]),
    }


def time_layer(triton_backend: ModuleType, hidden: int, tokens: int, with_cuda: bool) -> dict[str, float]:
    """Median seconds of every step and alternative."""
    one = Layer(hidden, tokens, seed=0)
    copies = -(-ROTATION_BYTES // (one.tables.nbytes + one.x.nbytes))
    layers = [one, *(Layer(hidden, tokens, seed) for seed in range(1, max(copies, 2)))]
    steps: dict[str, Callable[[Layer], Call]] = {
        "hash": lambda a: lambda: triton_backend.hash_codes(a.x, a.num_tables, 1.0, "probability"),
        "hash backward": lambda a: (
            lambda: triton_backend.hash_codes_backward(a.d_weights, a.x, a.num_tables, 1.0, "probability")
        ),
        **triton_steps(triton_backend),
        "embedding_bag": lambda a: lambda: a.embedding_bag(a.tables, a.weights),
        "embedding_bag backward": lambda a: a.embedding_bag_backward(),
        "composed backward": lambda a: (
            lambda: composition.lookup_backward([a.dy], a.codes, a.weights, [a.tables])
        ),
        "dense": lambda a: lambda: a.x @ a.dense,
        "dense backward": lambda a: lambda: (a.dy @ a.dense.T, a.x.T @ a.dy),
    }
    if with_cuda:
        steps["cuda"] = lambda a: lambda: cuda.lookup(a.codes, a.weights, [a.tables])
    return {name: measure([step(layer) for layer in layers]) for name, step in steps.items()}


def table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in [header, *rows]
    )


def sweep(triton_backend: ModuleType) -> None:
    """Triton's times for other sizes of a column block than the kernels' own."""
    from mf_train.kernels import triton_lookup

    chosen = triton_lookup.L2_BYTES
    rows = []
    for hidden, tokens in ((1024, 16384), (2048, 16384), (1024, 65536)):
        layers = [Layer(hidden, tokens, seed) for seed in range(3)]
        for megabytes in (4, 8, 16, 32, 64, 128):
            triton_lookup.L2_BYTES = megabytes * 2**20
            times = [
                measure([step(layer) for layer in layers]) for step in triton_steps(triton_backend).values()
            ]
            rows.append([str(hidden), str(tokens), str(megabytes), *_ns(times, tokens)])
    triton_lookup.L2_BYTES = chosen
    print(table(["D=O", "tokens", "block MiB", "forward ns", "backward ns"], rows), end="\n\n")


def train() -> None:
    """Tokens a second of tiny and small and their dense peers."""
    from mf_train.model import MemoryFormer, ModelConfig

    print("training: mf_train.model, not the trainer: random tokens, 8 x 2048 a step, bfloat16, fused AdamW")
    rows = []
    for name, hidden, layers, heads in (("tiny", 512, 6, 8), ("small", 768, 12, 12)):
        speeds = []
        for kind in ("memoryformer", "dense"):
            config = ModelConfig(kind=kind, hidden_size=hidden, num_layers=layers, num_heads=heads)
            model = MemoryFormer(config).to("cuda", DTYPE)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            tokens = torch.randint(config.vocab_size, (8, config.sequence_length + 1), device="cuda")

            def step(model=model, optimizer=optimizer, tokens=tokens) -> None:
                model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            speeds.append(8 * config.sequence_length / measure([step], seconds=3))
            del model, optimizer, step
            torch.cuda.empty_cache()
        rows.append([name, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}"])
    print(table(["model", "tokens/s", "dense tokens/s", "ratio"], rows), end="\n\n")


COLUMNS = ["hash", "triton", "of L2", "cuda", "of shared", "bag", "bag/triton", "dense"]
COLUMNS += ["hash'", "triton'", "/triton", "composed'", "bag'", "bag'/triton'", "dense'"]


def summarise(t: dict[str, float], lines: list[float], tokens: int) -> list[str]:
    """The cells of COLUMNS: ns a token, shares of the L2 and shared-memory lines, and ratios."""
    forward, backward = t["triton"], t["triton backward"]
    bag, bag_backward = t["embedding_bag"], t["embedding_bag backward"]
    with_cuda = [*_ns([t["cuda"]], tokens), f"{lines[2] / t['cuda']:.0%}"] if "cuda" in t else ["-", "-"]
    return [
        *_ns([t["hash"], forward], tokens),
        f"{lines[1] / forward:.0%}",
        *with_cuda,
        *_ns([bag], tokens),
        f"{bag / forward:.1f}",
        *_ns([t["dense"], t["hash backward"], backward], tokens),
        f"{backward / forward:.1f}",
        *_ns([t["composed backward"], bag_backward], tokens),
        f"{bag_backward / backward:.1f}",
        *_ns([t["dense backward"]], tokens),
    ]


def _ns(seconds: list[float], tokens: int) -> Iterator[str]:
    return (f"{1e9 * s / tokens:.1f}" for s in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 1024, 2048], help="D = O")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 16384, 65536])
    parser.add_argument(
        "--train", action="store_true", help="also tokens/s of tiny and small beside their dense peers"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="also other sizes of the Triton kernels' column blocks"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"benchmarks.gpu needs a CUDA device; torch {torch.__version__} finds none")
    try:
        import triton

        from mf_train.kernels import triton_backend
    except ImportError as error:
        raise SystemExit(f"benchmarks.gpu needs triton: {error}") from error

    device = torch.cuda.get_device_properties(0)
    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    machine = f"{device.name}, {device.multi_processor_count} multiprocessors, {versions}"
    print(machine)
    with_cuda = _can_use_cuda_kernel()
    check(triton_backend, with_cuda)
    hbm, l2_copy = copy_bandwidth(2**30), copy_bandwidth(6 * 2**20)
    shared = device.multi_processor_count * 128 * CLOCK
    print(
        f"TB/s: memory {hbm / 1e12:.2f} (copy), L2 {l2_copy / 1e12:.2f} (copy of 6 MiB). Lines: memory's copy, "
        f"L2 {L2_BYTES_A_SECOND / 1e12:.1f} (given), shared memory {shared / 1e12:.0f} (given)\n"
    )
    if arguments.sweep:
        sweep(triton_backend)
    if arguments.train:
        train()

    rows = []
    for hidden, tokens in itertools.product(arguments.hidden, arguments.tokens):
        t = time_layer(triton_backend, hidden, tokens, with_cuda)
        line_bytes = tokens * hidden // TAU * hidden * DTYPE.itemsize
        lines = [line_bytes / bandwidth for bandwidth in (hbm, L2_BYTES_A_SECOND, shared)]
        rows.append([str(hidden), str(tokens), *_ns(lines, tokens), *summarise(t, lines, tokens)])
        print(f"timed D = O = {hidden}, {tokens} tokens", flush=True)
    print(f"\n{machine}; bfloat16, tau {TAU}, median ns a token; ' is backward, bag F.embedding_bag")
    print(table(["D=O", "tokens", "HBM", "L2", "shared", *COLUMNS], rows))


def _can_use_cuda_kernel() -> bool:
    reason = cuda.unavailable_reason()
    if not reason:
        try:
            cuda.build()
        except Exception as error:  # whatever the compiler had to say
            reason = str(error).strip().splitlines()[-1]
    if reason:
        print(f"the CUDA kernel is left out: {reason}")
    return not reason


if __name__ == "__main__":
    main()
