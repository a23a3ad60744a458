"""Hash, lookup and norm of one memory layer: bfloat16, tau 8, D = O, K = D / 8 tables; beside what torch offers.

Calls go round copies of their arguments larger than the L2 cache, so that tables come from memory, as in training.
At the end the other Triton kernels (benchmarks.gpu.fused).
`--sweep` times other sizes of the Triton kernels' column blocks instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu import fused
from benchmarks.gpu.device import ROTATION_BYTES, Call, TimedDevice
from benchmarks.gpu.steps import (
    PartialError,
    Steps,
    describe,
    leave_if_device_lost,
    part_arguments,
)
from mf_train.kernels import composition, cuda, triton_backend, triton_blocks, triton_norm
from mf_train.model.sums import num_chunks
from mf_train.run_folder import read_records

TAU = 8
DTYPE = torch.bfloat16
HIDDEN, TOKENS = (1024, 512, 2048), (16384, 65536, 2048)  # the first of each tells most
_COPIES_NEED = 6  # times a layer's arguments: gradients, what is saved for them, sorted indices


class Layer:
    """Random arguments of one memory layer, and of the dense one that it replaces."""

    def __init__(self, device: TimedDevice, hidden: int, tokens: int, seed: int) -> None:
        generator = torch.Generator(device.type).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device.type).to(DTYPE)

        self.num_tables = hidden // TAU
        self.x, self.dy = normal(tokens, hidden), normal(tokens, hidden)
        self.tables = normal(self.num_tables, 2**TAU, hidden)
        self.codes, self.weights = composition.hash_codes(self.x, self.num_tables)
        self.d_weights = normal(tokens, self.num_tables)
        self.dense = normal(hidden, hidden)
        self.scale, self.shift = normal(2, hidden)
        self.chunk = hidden // num_chunks(hidden)
        first_row = torch.arange(self.num_tables, device=device.type, dtype=torch.int32) * 2**TAU
        self.rows = self.codes.to(torch.int32) + first_row

    def embedding_bag(self, tables: Tensor, weights: Tensor) -> Tensor:
        return F.embedding_bag(self.rows, tables.flatten(0, 1), per_sample_weights=weights, mode="sum")

    def norm_backward(self) -> Call:
        _, mean, rstd = triton_norm.normalise(self.x, None, self.scale, self.shift, self.chunk, 1e-5)
        given = self.dy, self.x, mean, rstd, self.scale
        return lambda: triton_norm.gradients(*given, None, self.chunk, centred=True)

    def layer_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.layer_norm(x, scale.shape, scale, shift)

    def layer_norm_backward(self) -> Call:
        """Torch's own, as `embedding_bag_backward`."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.scale, self.shift)]
        y = self.layer_norm(*leaves)
        return lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)

    def embedding_bag_backward(self) -> Call:
        """Its backward pass alone, which keeps the graph."""
        leaves = [self.tables.detach().requires_grad_(), self.weights.detach().requires_grad_()]
        y = self.embedding_bag(*leaves)
        return lambda: torch.autograd.grad(y, leaves, self.dy, retain_graph=True)


# What a call of each computes, given a layer; named as the table names it.
WAYS: dict[str, Callable[[Layer], Call]] = {
    "triton": lambda a: lambda: triton_backend.lookup(a.codes, a.weights, [a.tables]),
    "triton backward": lambda a: (
        lambda: triton_backend.lookup_backward([a.dy], a.codes, a.weights, [a.tables])
    ),
    "cuda": lambda a: lambda: cuda.lookup(a.codes, a.weights, [a.tables]),
    "embedding_bag": lambda a: lambda: a.embedding_bag(a.tables, a.weights),
    "embedding_bag backward": lambda a: a.embedding_bag_backward(),
    "dense": lambda a: lambda: a.x @ a.dense,
    "dense backward": lambda a: lambda: (a.dy @ a.dense.T, a.x.T @ a.dy),
    "hash": lambda a: lambda: triton_backend.hash_codes(a.x, a.num_tables, 1.0, "probability"),
    "hash backward": lambda a: (
        lambda: triton_backend.hash_codes_backward(a.d_weights, a.x, a.num_tables, 1.0, "probability")
    ),
    "norm": lambda a: lambda: triton_norm.normalise(a.x, None, a.scale, a.shift, a.chunk, 1e-5),
    "norm backward": lambda a: a.norm_backward(),
    "layer_norm": lambda a: lambda: a.layer_norm(a.x, a.scale, a.shift),
    "layer_norm backward": lambda a: a.layer_norm_backward(),
}


def layers_of(device: TimedDevice, hidden: int, tokens: int) -> list[Layer]:
    """Copies of a layer's arguments, more than L2 holds. Raises RuntimeError where memory is too small for them."""
    one = (2 * tokens * hidden + hidden // TAU * (2**TAU * hidden + 10 * tokens)) * DTYPE.itemsize
    copies = 1 if device.rehearse else max(2, -(-ROTATION_BYTES // one))
    device.require((copies + _COPIES_NEED) * one, f"a layer of D = O = {hidden} with {tokens} tokens")
    return [Layer(device, hidden, tokens, seed) for seed in range(copies)]


def time_layer(
    device: TimedDevice, hidden: int, tokens: int, without: Collection[str]
) -> Mapping[str, float]:
    """ns a token of each way but those in `without`. Raises PartialError where some failed."""
    layers = layers_of(device, hidden, tokens)
    found, failed = {}, {}
    for name, way in WAYS.items():
        if name in without:
            continue
        try:
            found[name] = 1e9 * device.measure([way(layer) for layer in layers]) / tokens
        except Exception as error:  # one way's failure is not the others'
            failed[name] = describe(error)
            leave_if_device_lost()
    if failed:
        raise PartialError(found, failed)
    return found


def build_cuda_kernel() -> Mapping[str, str]:
    """Compile the CUDA kernel, which is for one kind of GPU and needs nvcc; "left out" is why it cannot be timed."""
    if reason := cuda.unavailable_reason():
        return {"left out": reason}
    return {"library": cuda.build().name}


def sweep(device: TimedDevice, hidden: int, tokens: int) -> Mapping[str, object]:
    """ns a token, forward and backward, over the bytes of a column block of all tables."""
    layers, chosen = layers_of(device, hidden, tokens), triton_blocks.L2_BYTES
    found = {}
    try:
        for megabytes in (4, 8, 16, 32, 64, 128):
            triton_blocks.L2_BYTES = megabytes * 2**20
            for name in ("triton", "triton backward"):
                seconds = device.measure([WAYS[name](layer) for layer in layers])
                found[f"{name}, {megabytes} MiB"] = 1e9 * seconds / tokens
    finally:
        triton_blocks.L2_BYTES = chosen
    return found


def main() -> None:
    parser = part_arguments(__doc__)
    parser.add_argument("--sweep", action="store_true", help="times over the size of a column block")
    options = parser.parse_args()
    device, steps = TimedDevice(options.rehearse), Steps(options.results)
    hidden = (16, 24) if device.rehearse else HIDDEN
    tokens = (12,) if device.rehearse else TOKENS
    if options.sweep:
        for size in hidden:
            steps.run(f"sweep D {size}", lambda size=size: sweep(device, size, tokens[0]))
        return
    steps.run("CUDA kernel", build_cuda_kernel)
    built = [line for line in read_records(options.results) if "library" in line.get("values", {})]
    without = () if built else ("cuda",)
    for number in tokens:
        for size in hidden:
            steps.run(
                f"D {size} N {number}",
                lambda size=size, number=number: time_layer(device, size, number, without),
            )
    for name, step in fused.STEPS.items():
        steps.run(name, lambda step=step: step(device))


if __name__ == "__main__":
    main()
