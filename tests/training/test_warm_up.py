"""Kernels launched before the first step: the same ones as a step's, on one process of each node first."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.errors import PeerError, TrainingError, UserError
from mf_train.kernels import ops
from mf_train.kernels.build import BuildError, UnsupportedError
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import start_processes
from mf_train.parallel.processes import find_process
from mf_train.parallel.tensor import build_model
from mf_train.training.probe import run_probe
from mf_train.training.warm_up import (
    Pass,
    compile_kernels,
    explain,
    first_of_node,
    launch_kernels,
    run_passes,
)
from tests.distributed import run_distributed
from tests.parallel.worlds import make_groups

CPU = torch.device("cpu")
# every hash and lookup differs: bits, inner bits, and the columns of query, up and down
MODEL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, bits=4, expand_bits=2, vocab_size=128, sequence_length=160
)
Launch = tuple[Any, ...]


@contextmanager
def launches() -> Iterator[set[Launch]]:
    """Within the block, collects each distinct call of a backend: its name, and of every tensor what a kernel is
    compiled for: sizes, type, and whether its address is a multiple of 16 (where the caller's own memory is read).
    """
    found: set[Launch] = set()
    original = ops.find_backend

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (value.numel() // value.shape[-1], value.shape[-1]), value.dtype
        if isinstance(value, list | tuple):
            return tuple(describe(one) for one in value)
        return value

    def recorder(name: str, *tensors: torch.Tensor) -> SimpleNamespace:
        backend = original(name, *tensors)

        def record(call: str) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                tables = {"lookup": arguments[2:], "lookup_backward": arguments[3:]}.get(call, [()])[0]
                sizes = tuple((table.shape, table.data_ptr() % 16) for table in tables)
                found.add((call, sizes, *(describe(argument) for argument in arguments)))
                return getattr(backend, call)(*arguments)

            return run

        calls = ("hash_codes", "hash_codes_backward", "lookup", "lookup_backward")
        return SimpleNamespace(**{call: record(call) for call in calls}, column_sums=backend.column_sums)

    ops.find_backend = recorder  # type: ignore[assignment]
    try:
        yield found
    finally:
        ops.find_backend = original


ROWS = 2  # of a micro-batch
KINDS = [(0, "float32"), (1, "bfloat16"), (2, "float32"), (3, "bfloat16")]  # ZeRO stage and precision


def compare_all(rank: int, world_size: int) -> list[str]:
    start_processes(find_process(), CPU, 120)
    return compare(1) + compare(2)


def compare(tensor: int) -> list[str]:
    """What differs between a run's launches and those of `launch_kernels`, under every stage."""
    process = find_process()
    groups, world_size = make_groups(process, tensor), process.world_size
    differences = []
    for stage, precision in KINDS:
        config = Config(
            model=MODEL,
            parallel=ParallelConfig(tensor=tensor, zero_stage=stage),
            training=TrainingConfig(
                global_batch_size=ROWS * world_size // tensor, micro_batch_size=ROWS, precision=precision
            ),
        )
        exchange = Exchange(groups.tensor) if tensor > 1 else None
        model = build_model(MODEL, exchange, 0, CPU)
        engine = Engine(model, config, groups, CPU)
        step, probe = run_passes(config, world_size // tensor)
        batch = torch.randint(MODEL.vocab_size, (ROWS, MODEL.sequence_length + 1))

        def train(engine: Engine = engine, batch: torch.Tensor = batch) -> None:
            engine.backward(batch[:, :-1], batch[:, 1:], share=1.0, last=True)
            engine.update(1e-3)

        def look(engine: Engine = engine, exchange: Exchange | None = exchange) -> None:
            run_probe(engine, exchange, None)

        real: list[tuple[Pass, Callable[[], Any]]] = [
            (step, train),
            (probe, look),
        ]
        for one, action in real:
            with launches() as expected:
                action()
            with launches() as launched:
                launch_kernels(engine, [one])
            if expected != launched or len(launched) < (6 if one.backward else 3):
                lines = [f"missing {x}" for x in expected - launched] + [
                    f"more {x}" for x in launched - expected
                ]
                differences.append(f"P {tensor} stage {stage} {precision} {one}: " + "; ".join(lines))
    return differences


@pytest.mark.distributed
def test_what_is_launched_is_what_a_run_launches() -> None:
    for differences in run_distributed(compare_all, 2):
        assert not differences


def two_nodes(rank: int, world_size: int) -> tuple[tuple[float, float], str]:
    start_processes(find_process(), CPU, 60)
    return take_turns(rank), fail_on_node_1(rank)


def take_turns(rank: int) -> tuple[float, float]:
    """Start and end of the action on two nodes of two ranks, the second of which compiles more slowly."""
    times: list[float] = []

    def act() -> None:
        times.append(time.time())
        time.sleep(0.2 + 0.5 * (rank == 2))
        times.append(time.time())

    first_of_node(act, rank % 2, CPU, lambda: False)
    return times[0], times[1]


def fail_on_node_1(rank: int) -> str:
    def act() -> None:
        if rank == 2:
            raise explain(
                RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
            )
        assert rank != 3, "not before the first of its node is done"

    try:
        first_of_node(act, rank % 2, CPU, lambda: False)
    except PeerError as error:
        return f"peer {error.status}"
    except UserError as error:
        return str(error)
    return "nothing"


@pytest.mark.distributed
def test_two_nodes() -> None:
    """The first rank of each is done before the others begin; one without a compiler ends the run with one line."""
    times, (told, *others) = zip(*run_distributed(two_nodes, 4), strict=True)
    last_first = max(times[0][1], times[2][1])
    assert all(times[rank][0] >= last_first for rank in (1, 3))
    assert "gcc" in told and "Python.h" in told and "rank 2 on " in told and "\n" not in told
    assert others == ["peer 2"] * 3


def test_nothing_happens_on_a_cpu() -> None:
    """Without a process group, with which the first of the collectives would fail."""
    engine: Any = SimpleNamespace(device=CPU)
    config = replace(Config(), model=MODEL)
    with launches() as launched:
        compile_kernels(engine, config, lambda: False, lambda: None)
    assert not launched


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (RuntimeError("Failed to find C compiler. Please\nmore"), UserError, "install gcc"),
        (subprocess.CalledProcessError(1, ["gcc", "main.c"]), UserError, "Python.h"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/no/cc"), UserError, "install gcc"),
        (ImportError("x.so: failed to map segment from shared object"), UserError, "noexec"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), UserError, "TRITON_CACHE_DIR"),
        (BuildError("nvcc is not on the PATH; install it"), UserError, "kernels.backend: nvcc is not on"),
        (UnsupportedError("it takes no more rows"), UserError, "kernels.backend: it takes no more rows"),
        (torch.OutOfMemoryError("CUDA out of memory"), TrainingError, "OutOfMemoryError: CUDA out of memory"),
        (AssertionError(), TrainingError, "AssertionError: no message"),
    ],
    ids=["no compiler", "no header", "wrong CC", "noexec", "full", "nvcc", "tables", "memory", "other"],
)
def test_an_error_is_one_line_with_its_remedy(
    error: Exception, kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/no/cc")
    told = explain(error)
    assert type(told) is kind and words in str(told) and "\n" not in str(told)


def test_triton_s_own_words_without_a_compiler_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.setattr(build, "_find_compiler", build._find_compiler.__wrapped__)  # without its memory
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(RuntimeError) as raised:
        build._build("x", "x.c", os.curdir, [], [], [], [])
    assert "install gcc" in str(explain(raised.value))
    monkeypatch.setenv("CC", "/no/cc")
    with pytest.raises(OSError) as missing:
        build._build("x", "x.c", os.curdir, [], [], [], [])
    assert "install gcc" in str(explain(missing.value))
