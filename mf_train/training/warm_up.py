"""Triton's kernels compiled before the first step, by one process of each node; the others load what it compiled.

Triton compiles a kernel when it is first launched with arguments of some kind: their types, sizes that are compiled in,
and whether sizes and addresses are multiples of 16. Here every kernel of hash and lookup is launched once with
arguments of the kinds that the run has, on random numbers.
"""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mf_train.checkpoint.probe import probe_length
from mf_train.config import Config
from mf_train.errors import TrainingError, UserError
from mf_train.kernels import hash_codes, lookup_all
from mf_train.kernels.backends import uses_triton
from mf_train.kernels.build import BuildError, UnsupportedError
from mf_train.model.memory import Hash
from mf_train.parallel.agreement import run_long_on_all
from mf_train.parallel.degrees import micro_batch_sizes
from mf_train.parallel.engine import Engine


class Pass(NamedTuple):
    """A pass of the model that a run makes."""

    tokens: int
    backward: bool


def compile_kernels(
    engine: Engine,
    config: Config,
    stop: Callable[[], bool],
    still_alive: Callable[[], None],
) -> None:
    """Launch the run's kernels, first in one process of each node. Collective; does nothing where Triton does not run.

    `still_alive` is called after each launch, `stop` as in `run_long_on_all`. Raises as that does: UserError where a
    node cannot compile, TrainingError where a kernel fails.
    """
    if uses_triton(engine.device) and "memory" in config.model.layer_kinds:
        passes = run_passes(config, engine.groups.degrees.data)
        local_rank = engine.groups.degrees.local_rank
        first_of_node(lambda: _launch(engine, passes, still_alive), local_rank, engine.device, stop)


def run_passes(config: Config, data: int) -> list[Pass]:
    """Micro-batches of `data` ranks, and the probe of a checkpoint."""
    passes = [Pass(size * config.model.sequence_length, True) for size in micro_batch_sizes(config, data)]
    return [*passes, Pass(probe_length(config.model), False)]


def first_of_node(
    action: Callable[[], None], local_rank: int, device: torch.device, stop: Callable[[], bool]
) -> None:
    """Run an action on every rank: on local rank 0 of each node, and when all of these are done on the others.

    No collective waits long meanwhile. Collective over all ranks; fails as `run_long_on_all`.
    """
    for mine in (local_rank == 0, local_rank != 0):
        run_long_on_all(action if mine else _nothing, device, stop, _nothing)


def _nothing() -> None:
    return None


def _launch(engine: Engine, passes: list[Pass], still_alive: Callable[[], None]) -> None:
    """In a thread, which has a current device of its own."""
    device = engine.device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            launch_kernels(engine, passes, still_alive)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
    except Exception as error:
        raise explain(error) from error


def launch_kernels(engine: Engine, passes: list[Pass], still_alive: Callable[[], None] = _nothing) -> None:
    """Hash and look up random features as each layer of the engine's model does in these passes. No collectives."""
    size = engine.groups.degrees.tensor
    numbers = torch.Generator(engine.device).manual_seed(0)
    for tokens, backward in passes:
        for layer, tables, chunks in _kinds_of_layers(engine):
            hashed = tables[0].shape[0] // size  # by this rank
            shape, dtype = (tokens, hashed * layer.bits), tables[0].dtype
            x = torch.randn(shape, generator=numbers, dtype=dtype, device=engine.device)
            for tensor in (x, *tables):
                tensor.requires_grad_(backward)
            codes, weights = hash_codes(x, hashed, layer.temperature, layer.score)
            still_alive()
            if size > 1:  # repeated in the place of what the other ranks send, which arrives in float32
                codes, weights = codes.repeat(1, size), weights.repeat(1, size).float()
            biases = [one.new_zeros(one.shape[-1]) for one in tables]
            ys = lookup_all(codes, weights, tables, biases, chunks=chunks)
            still_alive()
            if backward:
                # tables whose gradients go to sums get none
                torch.autograd.grad(ys, [x, *tables], [torch.ones_like(y) for y in ys], allow_unused=True)
                still_alive()


def _kinds_of_layers(engine: Engine) -> Iterator[tuple[Hash, list[Tensor], int]]:
    """Each hash of the model with the tables that read its codes and their chunks of columns, once of those for which
    the kernels are the same.
    """
    seen = set()
    blocks: Iterable[Any] = engine.model.blocks
    for block in blocks:
        for layer, lookups in block.memory_layers():
            tables = [_whole(engine, module.tables) for module in lookups]
            kind = (
                layer.bits,
                layer.temperature,
                layer.score,
                *((t.shape, t.data_ptr() % 16) for t in tables),
            )
            if kind not in seen:
                seen.add(kind)
                yield (
                    layer,
                    tables,
                    min(t.shape[-1] // module.chunk for t, module in zip(tables, lookups, strict=True)),
                )


def _whole(engine: Engine, tables: torch.nn.Parameter) -> Tensor:
    """The rank's tables; zeros of their shape while ZeRO 3 has them partitioned."""
    shape = engine.local_shape(tables)
    if tables.shape != shape:
        return torch.zeros(shape, dtype=tables.dtype, device=tables.device)
    whole = tables.detach()
    if hasattr(tables, "gradient_sum"):
        whole.gradient_sum = _Scratch(whole)  # type: ignore[attr-defined]
    return whole


class _Scratch(NamedTuple):
    """In the place of the sums of the tables' gradient."""

    tables: Tensor

    def begin(self) -> tuple[Tensor, bool]:
        return torch.empty_like(self.tables, dtype=torch.float32), False

    def done(self) -> None: ...


def explain(error: Exception) -> UserError | TrainingError:
    """The error of a first launch as one line with its cause and, where that is known, its remedy."""
    lines = str(error).strip().splitlines()
    words = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    named = isinstance(error, OSError) and error.filename == os.environ.get("CC", "")
    if isinstance(error, subprocess.SubprocessError) or named or "C compiler" in words:
        return UserError(
            f"Triton could not compile the kernels of hash and lookup ({words}): it needs a C compiler and Python.h on "
            "every GPU node and in every image: install gcc and Python's headers (python3-dev), or set CC"
        )
    if isinstance(error, BuildError | UnsupportedError):  # there is no nvcc, or it does not take these tables
        return UserError(f"kernels.backend: {error}")
    if isinstance(error, ImportError | OSError):
        return UserError(
            f"Triton could not keep or load the kernels of hash and lookup ({words}): set TRITON_CACHE_DIR to a folder "
            "on the node's own disk with free space, from which programs may be loaded (not mounted noexec)"
        )
    return TrainingError(f"the kernels of hash and lookup failed before the first step ({words})")
