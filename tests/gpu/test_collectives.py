"""Collectives on the device, counted by events and by torch's recorder; its NUMA node; the check of its kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mf_train.kernels import describe
from mf_train.parallel.collectives import Ledger, Mark, recorded, recording
from mf_train.training.binding import gpu_node
from mf_train.training.kernel_check import check_kernels
from tests.distributed import run_distributed
from tests.gpu.device import device_or_skip

DEVICE = device_or_skip()


def count(rank: int, world_size: int) -> tuple[tuple[Mark, Mark], tuple[Mark, Mark], int, int]:
    """What the ledger says before the device has come to a collective, and after; the recorder's count and dump."""
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device("cpu")
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    values, ledger, before = torch.ones(4, device=device), Ledger(), recorded().called
    dist.all_reduce(values)
    if DEVICE == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    with ledger.note("sum", device):
        dist.all_reduce(values)
    waiting = ledger.last()
    if DEVICE == "cuda":
        torch.cuda.synchronize(device)
    return waiting, ledger.last(), recorded().called - before, len(recording())


def test_the_device_s_progress_is_seen_without_waiting_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    [(waiting, done, called, dumped)] = run_distributed(count, 1)
    mark = Mark(1, "sum")
    assert waiting == ((Mark(), Mark()) if DEVICE == "cuda" else (mark, mark))
    assert done == (mark, mark)
    assert called == 2 and dumped > 0


def test_the_device_computes_right() -> None:
    device = torch.device(DEVICE)
    assert check_kernels(device) == describe(device)


def test_the_device_s_numa_node_is_one_of_the_machine_s() -> None:
    node = gpu_node(torch.device(DEVICE, 0))
    assert node is None or Path(f"/sys/devices/system/node/node{node}").is_dir()
