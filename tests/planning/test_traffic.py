"""Bytes between ranks as computed, against collectives that are counted while real ranks train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.model import MemoryFormer
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import Groups, start_processes, stop_processes
from mf_train.parallel.processes import find_process
from mf_train.parallel.tensor import shard_model
from mf_train.planning.traffic import data_parallel_bytes, tensor_parallel_bytes_per_token

MODEL = ModelConfig(
    hidden_size=64, num_layers=2, num_heads=4, bits=8, vocab_size=512, sequence_length=16
)  # 10-bit codes in the inner hash: those travel in two bytes
RANKS, BATCH, MICRO = 2, 8, 2
FEWEST = 64  # elements: smaller collectives are single numbers, which the formula leaves out
# How often a tensor goes round the ring: by c10d operator, of the whole (all-reduce) or the gathered tensor.
PASSES = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allgather_": 1,
    "reduce_scatter_": 1,
}


class Count(TorchDispatchMode):
    """Bytes of a ring in each collective of torch.distributed that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(leaf)]
            whole = max(tensors, key=torch.numel)
            if whole.numel() >= FEWEST:
                assert name in PASSES, name
                bytes_sent = PASSES[name] * whole.nbytes * (RANKS - 1) / RANKS
                self.sent[name] = self.sent.get(name, 0) + bytes_sent
        return func(*args, **(kwargs or {}))


def make(tensor: int, stage: int, precision: str) -> Config:
    training = TrainingConfig(
        global_batch_size=BATCH,
        micro_batch_size=MICRO,
        precision=precision,  # type: ignore[arg-type]
        device="cpu",
    )
    return Config(model=MODEL, training=training, parallel=ParallelConfig(tensor=tensor, zero_stage=stage))


CASES = [(0, "float32"), (1, "float32"), (2, "float32"), (3, "float32"), (1, "bfloat16")]


def count_steps(rank: int, size: int) -> dict[str, float]:
    """Bytes that this rank sent in a second step under each case of data parallelism."""
    process, cpu = find_process(), torch.device("cpu")
    start_processes(process, cpu, 300)
    groups = Groups(Degrees(process.rank, process.world_size, 1), 300)
    found = {}
    for stage, precision in CASES:
        torch.manual_seed(rank)
        engine = Engine(MemoryFormer(MODEL), make(1, stage, precision), groups, cpu)
        train_step(engine)  # stage 3 traces its first step, and compares the traces of all ranks
        with Count() as count:
            train_step(engine)
        found[f"{stage} {precision}"] = sum(count.sent.values())
    stop_processes()
    return found


def train_step(engine: Engine) -> None:
    for index in range(engine.accumulation):
        tokens = torch.randint(MODEL.vocab_size, (MICRO, MODEL.sequence_length + 1))
        engine.backward(tokens[:, :-1], tokens[:, 1:], last=index == engine.accumulation - 1)
    engine.update(1e-4)


@pytest.mark.slow
@pytest.mark.distributed
def test_data_parallel_bytes_are_those_sent() -> None:
    from tests.distributed import run_distributed

    counted = run_distributed(count_steps, RANKS, timeout=400)
    for stage, precision in CASES:
        computed = sum(data_parallel_bytes(make(1, stage, precision), RANKS).values())
        for rank in range(RANKS):
            # DeepSpeed fills flat buffers up to whole partitions
            assert counted[rank][f"{stage} {precision}"] == pytest.approx(computed, rel=2e-3), (
                stage,
                precision,
            )


def count_exchange(rank: int, size: int, norm: str) -> float:
    """Bytes a token that this tensor-parallel rank sent in one pass forward and backward."""
    process, cpu = find_process(), torch.device("cpu")
    start_processes(process, cpu, 300)
    groups = Groups(Degrees(process.rank, process.world_size, size), 300)
    exchange = Exchange(groups.tensor)
    model = shard_model(MemoryFormer(MODEL), exchange)
    tokens = torch.randint(MODEL.vocab_size, (3, MODEL.sequence_length + 1))
    torch.distributed.broadcast(tokens, 0)
    model(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    stop_processes()
    return exchange.bytes_sent / tokens[:, 1:].numel()


@pytest.mark.distributed
def test_tensor_parallel_bytes_are_those_sent() -> None:
    from tests.distributed import run_distributed

    computed = tensor_parallel_bytes_per_token(make(2, 1, "float32"))
    assert run_distributed(count_exchange, 2, "layernorm") == [computed] * 2
