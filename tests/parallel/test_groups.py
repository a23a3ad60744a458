"""How the process group is joined, and which process a GPU belongs to."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from mf_train.errors import UserError
from mf_train.parallel.groups import bound_device, claim_gpu, start_processes
from mf_train.parallel.processes import Process, find_process
from tests.distributed import run_distributed


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
