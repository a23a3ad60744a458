"""The helper that other tests rely on: results, failures, deaths and hangs of the processes it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import DistributedError, run_distributed
from tests.warm import free_port

pytestmark = pytest.mark.distributed


def _sum_over_ranks(rank: int, world_size: int, x: torch.Tensor) -> tuple[torch.Tensor, str, int]:
    total = x * (rank + 1)
    dist.all_reduce(total)
    return total, os.environ["LOCAL_RANK"], torch.get_num_threads()


def _fail_on_rank_1(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    if rank == 1:
        raise ValueError("a fault of rank 1")
    dist.barrier()


def _die_on_rank_1(rank: int, world_size: int) -> int:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return rank


def _hang_on_rank_1(rank: int, world_size: int, folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, str(rank)).write_text(f"{os.getpid()} {child.pid}")
    if rank == 1:
        _sleep_for_ever()


def _sleep_for_ever() -> None:
    time.sleep(600)


def _two_groups_in_turn(rank: int, world_size: int, ports: list[int]) -> list[float]:
    sums = []
    for port in ports:  # each its own: a rank that is ahead would meet the other's old store
        os.environ["MASTER_PORT"] = str(port)
        dist.init_process_group("gloo")
        x = torch.ones(1)
        dist.all_reduce(x)
        sums.append(x.item())
        dist.destroy_process_group()
    return sums


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_back_in_rank_order() -> None:
    x = torch.randn(3, generator=torch.Generator().manual_seed(1))
    results = run_distributed(_sum_over_ranks, 2, x, init=True)
    assert [local_rank for _, local_rank, _ in results] == ["0", "1"]
    for total, _, threads in results:
        torch.testing.assert_close(total, 3 * x)
        assert threads == 1


def test_process_groups_can_be_made_in_turn() -> None:
    assert run_distributed(_two_groups_in_turn, 2, [free_port(), free_port()]) == [[2.0, 2.0]] * 2


def test_an_exception_names_the_rank_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(DistributedError, match=r"rank 1 raised:\n(.*\n)*ValueError: a fault of rank 1"):
        run_distributed(_fail_on_rank_1, 2, timeout=100)
    assert time.monotonic() - started < 90  # rank 0, in its barrier, was not waited for


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(DistributedError, match="rank 1 died with exit code -9"):
        run_distributed(_die_on_rank_1, 2)


@pytest.mark.slow
def test_a_hang_shows_the_stack_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DistributedError, match=r"ranks \[1\] did not finish in 20 s(.*\n)*.*_sleep_for_ever"):
        run_distributed(_hang_on_rank_1, 2, str(tmp_path), timeout=20)
    pids = [int(pid) for rank in "01" for pid in (tmp_path / rank).read_text().split()]
    assert len(pids) == 4
    deadline = time.monotonic() + 10  # they were killed, but a grandchild may take a moment to go
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
