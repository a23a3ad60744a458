"""How the process group is joined, and which process a GPU belongs to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
from mf_train.errors import UserError
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.groups import Groups, bound_device, claim_gpu, start_processes
from mf_train.parallel.processes import Process, find_process
from mf_train.parallel.tensor import build_model
from tests.distributed import run_distributed
from tests.processes import run_python


def test_the_group_is_bound_to_a_gpu_only_where_there_are_several_processes() -> None:
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    assert bound_device(Process(1, 2, 1), gpu) == gpu
    assert bound_device(Process(0, 1, 0), gpu) is None
    assert bound_device(Process(1, 2, 1), cpu) is None


def claims(rank: int, world_size: int, cases: list[list[str]]) -> list[str]:
    """What a rank is told that claims the GPU `uuids[rank]` of a store that all share, in the order of ranks."""
    process = find_process()
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    store = dist.TCPStore(
        process.master_address, process.master_port, is_master=False, wait_for_workers=False
    )
    told = ["taken"] * len(cases)
    for number, uuids in enumerate(cases):
        for turn in range(world_size):
            if turn == rank:
                try:
                    claim_gpu(store, rank, uuids[rank])
                    claim_gpu(store, rank, uuids[rank])  # its own: no other's
                except UserError as error:
                    told[number] = str(error)
            dist.barrier()
    return told


@pytest.mark.distributed
def test_a_gpu_that_another_rank_has_is_refused() -> None:
    cases = [["GPU-a", "GPU-b", "GPU-c"], ["GPU-d", "GPU-e", "GPU-d"]]
    different, (first, second, third) = zip(*run_distributed(claims, 3, cases), strict=True)
    assert different == ("taken",) * 3
    assert first == second == "taken"
    assert "rank 2 on " in third and "the same GPU as rank 0" in third and "--gpus-per-task=1" in third


def joined(rank: int, world_size: int) -> float:
    start_processes(find_process(), torch.device("cpu"), 60)
    total = torch.full((), rank + 1.0)
    dist.all_reduce(total)
    return total.item()


@pytest.mark.distributed
def test_processes_meet_at_the_launcher_s_address() -> None:
    assert run_distributed(joined, 2) == [3.0, 3.0]


# W, P and how many groups a rank makes; a group of all ranks is the default one
SIZES = [(1, 1, 0), (8, 8, 1), (8, 1, 1), (8, 2, 2), (64, 8, 2), (1000, 8, 2), (1000, 1, 1)]


def count_groups(rank: int, world_size: int) -> list[tuple[int, int, set[int]]]:
    """For each of SIZES: W, P, and the numbers of groups that ranks of a simulated world make at start.

    In these worlds collectives do nothing. Rank 0 also makes the engine, which is to make no group.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    calls = 0

    def count(name: str) -> None:
        function = getattr(dist, name)

        def counted(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            return function(*args, **options)

        setattr(dist, name, counted)

    for name in ("new_group", "split_group", "new_subgroups_by_enumeration"):
        count(name)
    found = []
    for world, tensor, _ in SIZES:
        counts = set()
        for member in {0, world // 2, world - 1}:
            dist.init_process_group("fake", rank=member, world_size=world, store=FakeStore())
            calls = 0
            groups = Groups(Degrees(member, world, tensor), 60)
            column, row = member % tensor, member - member % tensor
            assert dist.get_process_group_ranks(groups.tensor) == [*range(row, row + tensor)]
            assert dist.get_process_group_ranks(groups.data) == [*range(column, world, tensor)]
            if member == 0:
                make_engine(groups)
            counts.add(calls)
            dist.destroy_process_group()
        found.append((world, tensor, counts))
    return found


def make_engine(groups: Groups) -> None:
    cpu, degrees = torch.device("cpu"), groups.degrees
    model = ModelConfig(
        hidden_size=256, num_layers=1, num_heads=8, bits=4, vocab_size=128, sequence_length=16
    )
    config = Config(
        model=model,
        parallel=ParallelConfig(tensor=degrees.tensor, zero_stage=1),
        training=TrainingConfig(global_batch_size=2 * degrees.data, micro_batch_size=2, precision="bfloat16"),
    )
    exchange = Exchange(groups.tensor) if degrees.tensor > 1 else None
    Engine(build_model(model, exchange, 0, cpu), config, groups, cpu)


@pytest.mark.distributed
def test_the_groups_that_a_rank_makes_do_not_grow_with_the_ranks() -> None:
    [found] = run_distributed(count_groups, 1)
    assert found == [(world, tensor, {calls}) for world, tensor, calls in SIZES]


def totals(rank: int, world_size: int) -> dict[int, list[float]]:
    """Sums of the ranks' numbers over both groups of this rank, by P, from several sets of groups in one process."""
    start_processes(find_process(), torch.device("cpu"), 60)
    sums = {}
    for tensor in (1, 2, 4):
        groups = Groups(Degrees(rank, world_size, tensor), 60)
        values = [torch.full((), float(rank)) for _ in range(2)]
        for value, group in zip(values, (groups.tensor, groups.data), strict=True):
            dist.all_reduce(value, group=group)
        sums[tensor] = [value.item() for value in values]
    return sums


@pytest.mark.distributed
def test_the_groups_hold_neighbours_and_those_at_the_same_place() -> None:
    zero, _, two, _ = run_distributed(totals, 4)
    assert zero == {1: [0.0, 6.0], 2: [1.0, 2.0], 4: [6.0, 0.0]}
    assert two == {1: [2.0, 6.0], 2: [5.0, 2.0], 4: [6.0, 2.0]}


def test_one_process_does_without_megatron() -> None:
    code = """
import sys
import torch, torch.distributed as dist
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.groups import Groups, start_processes, stop_processes
from mf_train.parallel.processes import find_process
start_processes(find_process(), torch.device("cpu"), 60)
groups = Groups(Degrees(0, 1, 1, 0, 1), 60)
assert groups.tensor is groups.data is dist.group.WORLD
stop_processes()
assert not dist.is_initialized()
print(any(name.startswith("megatron") for name in sys.modules))
"""
    assert run_python(code).strip() == "False"
