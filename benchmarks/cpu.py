"""`python -m benchmarks.cpu`: the C++ operation against the composition, and bytes moved against bandwidth measured."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.tables import table
from mf_train.doctor.timing import compare, copy_bandwidth
from mf_train.kernels import composition, cpu

HIDDEN, TABLES, TOKENS = 512, 64, 2048  # D = O and K of the tiny model, tau = 8; a micro batch
SETS = 3  # Q, K and V
L2_BYTES = 512 * 1024  # an array that stays in a core's L2


@dataclass
class Measurement:
    name: str
    seconds: float
    baseline: float
    cached_bytes: int  # rows or dy gathered, which a tile in L2 can serve
    memory_bytes: int  # arguments and results, each once
    multiply_adds: int


class Layer:
    """Inputs of `SETS` memory layers that share x, and the steps by a backend (a module of mf_train.kernels)."""

    def __init__(self, dtype: torch.dtype, tokens: int, hidden: int = HIDDEN, tables: int = TABLES) -> None:
        generator = torch.Generator().manual_seed(0)
        tau = hidden // tables

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.num_tables = tables
        self.x = random(tokens, hidden)
        self.tables = [random(tables, 2**tau, hidden) for _ in range(SETS)]
        self.dys = [random(tokens, hidden) for _ in range(SETS)]
        self.codes, self.weights = cpu.hash_codes(self.x, tables)
        self.d_weights = random(tokens, tables)

    def hash(self, backend) -> tuple[Tensor, Tensor]:
        return backend.hash_codes(self.x, self.num_tables, 1.0, "probability")

    def hash_backward(self, backend, d_weights: Tensor | None = None) -> Tensor:
        d_weights = self.d_weights if d_weights is None else d_weights
        return backend.hash_codes_backward(d_weights, self.x, self.num_tables, 1.0, "probability")

    def lookup(self, backend) -> list[Tensor]:
        return backend.lookup(self.codes, self.weights, self.tables[:1])

    def lookup_backward(self, backend) -> tuple[Tensor, list[Tensor]]:
        return backend.lookup_backward(self.dys[:1], self.codes, self.weights, self.tables[:1])

    def forward(self, backend, first: int = 0, last: int = 1) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Hash, then the lookups of sets [first, last) in one call."""
        codes, weights = self.hash(backend)
        return codes, weights, backend.lookup(codes, weights, self.tables[first:last])

    def both(self, backend, first: int = 0, last: int = 1) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward; d x and d tables."""
        codes, weights, _ = self.forward(backend, first, last)
        dys, tables = self.dys[first:last], self.tables[first:last]
        d_weights, d_tables = backend.lookup_backward(dys, codes, weights, tables)
        return self.hash_backward(backend, d_weights), d_tables

    def forward_one_by_one(self, backend) -> list:
        return [self.forward(backend, i, i + 1) for i in range(SETS)]

    def both_one_by_one(self, backend) -> list:
        """As autograd would: the gradients that reach x are added, and those of all tables are kept."""
        results = [self.both(backend, i, i + 1) for i in range(SETS)]
        return [sum(dx for dx, _ in results), results]

    def by_autograd(self) -> tuple[Tensor, ...]:
        """Forward and backward of the composition as autograd alone differentiates it."""
        x, tables = self.x.detach().requires_grad_(), self.tables[0].detach().requires_grad_()
        (y,) = composition.lookup(*composition.hash_codes(x, self.num_tables), [tables])
        return torch.autograd.grad(y, (x, tables), self.dys[0])


def against_composition(dtype: torch.dtype, seconds: float) -> list[Measurement]:
    """Every step of one memory layer of the tiny model, by the C++ operation and by the composition."""
    layer = Layer(dtype, TOKENS)
    size = layer.x.element_size()
    rows = TOKENS * TABLES * HIDDEN * size  # one row of every table for every token
    tables, x = layer.tables[0].nbytes, layer.x.nbytes
    terms = TOKENS * TABLES * HIDDEN
    hashed = layer.codes.nbytes + layer.weights.nbytes
    counts = {  # bytes from caches, bytes from memory, multiply-adds
        "hash": (0, x + hashed, 0),
        "hash backward": (0, 2 * x + layer.weights.nbytes, 0),
        "lookup": (rows, tables + x + hashed, terms),
        "lookup backward": (rows, 2 * tables + x + 2 * hashed, 2 * terms),
        "forward": (rows, tables + 2 * x + 2 * hashed, terms),
        "forward + backward": (2 * rows, 3 * tables + 5 * x + 4 * hashed, 3 * terms),
    }
    steps: dict[str, Callable] = {
        "hash": layer.hash,
        "hash backward": layer.hash_backward,
        "lookup": layer.lookup,
        "lookup backward": layer.lookup_backward,
        "forward": layer.forward,
        "forward + backward": layer.both,
    }
    measurements = []
    for name, step in steps.items():
        times = compare(
            {"cpu": lambda step=step: step(cpu), "composition": lambda step=step: step(composition)}, seconds
        )
        measurements.append(Measurement(name, times["cpu"], times["composition"], *counts[name]))
    times = compare({"cpu": lambda: layer.both(cpu), "autograd": layer.by_autograd}, seconds)
    name = "the same, composition by autograd"
    measurements.append(Measurement(name, times["cpu"], times["autograd"], *counts["forward + backward"]))
    return measurements


def fused(dtype: torch.dtype, seconds: float) -> list[list[str]]:
    """Q, K and V by one hash and one lookup against three of each, both by the C++ operation."""
    layer = Layer(dtype, TOKENS)
    rows = []
    for name, one, three in (
        ("forward", lambda: layer.forward(cpu, 0, SETS), lambda: layer.forward_one_by_one(cpu)),
        ("forward + backward", lambda: layer.both(cpu, 0, SETS), lambda: layer.both_one_by_one(cpu)),
    ):
        times = compare({"one": one, "three": three}, seconds)
        rows.append([name, *_milliseconds(times["one"], times["three"])])
    return rows


def one_token(dtype: torch.dtype, seconds: float) -> list[list[str]]:
    """A single token through hash and lookup, at the base model's width."""
    rows = []
    for hidden, tables in ((512, 64), (1024, 128)):
        layer = Layer(dtype, 1, hidden, tables)
        alternatives = {
            "cpu": lambda layer=layer: layer.forward(cpu),
            "composition": lambda layer=layer: layer.forward(composition),
        }
        times = compare(alternatives, seconds, warmup=100)
        rows.append([f"D = O = {hidden}", *_milliseconds(times["cpu"], times["composition"])])
    return rows


def _milliseconds(mine: float, other: float) -> list[str]:
    return [f"{1e3 * mine:.3f}", f"{1e3 * other:.3f}", f"{other / mine:.2f}"]


def step_rows(measurements: list[Measurement], copy: float, l2: float) -> list[list[str]]:
    """Time, ratio, and the part of a copy's bandwidth (memory) and of L2's that the bytes over the time are."""
    return [
        [
            m.name,
            *_milliseconds(m.seconds, m.baseline),
            f"{m.memory_bytes / 1e6:.1f}",
            f"{m.memory_bytes / m.seconds / copy:.0%}",
            f"{m.cached_bytes / 1e6:.1f}",
            f"{m.cached_bytes / m.seconds / l2:.0%}" if m.cached_bytes else "",
        ]
        for m in measurements
    ]


def plot(path: Path, measurements: dict[str, list[Measurement]], copy: float, l2: float) -> None:
    """The roofline. Each step twice at its speed: right by memory's bytes, left (a tick) by those of the caches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    intensity = [0.1, 10.0]
    for name, bandwidth, style in (("memory copy", copy, "k-"), ("L2 read", l2, "k--")):
        label = f"{name}, {bandwidth / 1e9:.0f} GB/s"
        axes.plot(intensity, [bandwidth * i / 1e9 for i in intensity], style, label=label)
    for dtype, marker in zip(measurements, "os", strict=False):
        for m in measurements[dtype]:
            if m.multiply_adds:
                x, y = m.multiply_adds / m.memory_bytes, m.multiply_adds / m.seconds / 1e9
                (point,) = axes.plot(x, y, marker, label=f"{m.name}, {dtype}")
                color = point.get_color()
                axes.plot([m.multiply_adds / m.cached_bytes, x], [y, y], "|:", color=color, alpha=0.6)
                axes.plot(x, m.multiply_adds / m.baseline / 1e9, marker, color=color, fillstyle="none")
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte", ylabel="10^9 multiply-adds / s")
    axes.set(title=f"D = O = {HIDDEN}, tau 8, {TOKENS} tokens; hollow: composition")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(which="both", alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def measure(seconds: float, plot_path: Path | None) -> list[str]:
    """All tables, as text."""
    copy, l2 = copy_bandwidth(), machine.read_bandwidth(L2_BYTES)
    parts = [
        f"copy {copy / 1e9:.1f} GB/s (read + written, 256 MiB), L2 read {l2 / 1e9:.0f} GB/s",
        "ms are medians of interleaved calls; MB memory: arguments and results once; MB cache: rows and dy gathered",
    ]
    measurements = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        measurements[name] = against_composition(dtype, seconds)
        header = [
            f"{name}, D = O = {HIDDEN}, tau 8, N = {TOKENS}",
            "ms",
            "composition ms",
            "ratio",
            "MB memory",
        ]
        header += ["of copy", "MB cache", "of L2"]
        parts.append(table(header, step_rows(measurements[name], copy, l2)))
        header = [f"{name}, Q K V", "fused ms", "three calls ms", "ratio"]
        parts.append(table(header, fused(dtype, seconds)))
        header = [f"{name}, one token, hash + lookup", "ms", "composition ms", "ratio"]
        parts.append(table(header, one_token(dtype, min(seconds, 1.0))))
    if plot_path:
        plot(plot_path, measurements, copy, l2)
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each comparison")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-cpu.txt")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the roofline")
    options = parser.parse_args()
    if cpu.library() is None:
        sys.exit(f"nothing to measure: {cpu.reason()}")
    machine.report("cpu", measure(options.seconds, options.plot), save=options.save)


if __name__ == "__main__":
    main()
