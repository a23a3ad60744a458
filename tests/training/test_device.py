"""Which GPU is a process's own, and whether the host has room for what is put there."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_train import control_groups, host_memory
from mf_train.config import Config, ParallelConfig
from mf_train.errors import UserError
from mf_train.parallel.degrees import Degrees
from mf_train.training.device import check_host_memory, gpu_index
from tests.processes import run_python


def test_a_process_takes_the_gpu_of_its_local_rank_or_the_only_one_it_sees() -> None:
    assert [gpu_index(rank, 4) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu_index(rank, 1) for rank in range(4)] == [0, 0, 0, 0]


@pytest.mark.parametrize(("local_rank", "visible"), [(2, 2), (7, 4), (0, 0), (3, 0)])
def test_a_process_without_a_gpu_of_its_own_is_refused(local_rank: int, visible: int) -> None:
    with pytest.raises(
        UserError, match=rf"local rank {local_rank} has no GPU of its own \({visible} visible\)"
    ):
        gpu_index(local_rank, visible)


@pytest.mark.parametrize(
    ("offload", "kilobytes", "refused"),
    [("optimizer", 6_000_000, True), ("optimizer", 8_000_000, False), ("none", 1, False)],
)
def test_a_host_without_room_is_refused_with_the_numbers(
    offload: str, kilobytes: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.467 B parameters of 16 bytes, shared by 2 ranks on one node."""
    memory = tmp_path / "meminfo"
    memory.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {kilobytes} kB\n")
    monkeypatch.setattr(host_memory, "MEMINFO", memory)
    monkeypatch.setattr(control_groups, "OWN_GROUPS", tmp_path / "none")
    config = Config(parallel=ParallelConfig(offload=offload))  # type: ignore[arg-type]
    degrees = Degrees(0, 2, 1, 0, 2)
    if not refused:
        check_host_memory(config, degrees)
        return
    with pytest.raises(
        UserError, match=r"the 2 processes of this node need 7\.5 GB .* of which 6\.1 GB are available"
    ):
        check_host_memory(config, degrees)


def test_deterministic_runs_refuse_operations_that_are_not() -> None:
    """torch raises for one that has no deterministic form on a CPU either; what the user set for cuBLAS stays."""
    code = """
import torch
from mf_train.training.device import make_deterministic
unset, mine = {}, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
make_deterministic(unset), make_deterministic(mine)
assert unset == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} and mine == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory
try:
    torch.zeros(2).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
except RuntimeError as error:
    print("deterministic" in str(error))
"""
    assert run_python(code).strip() == "True"


@pytest.mark.parametrize(("environment", "threads"), [("{}", 3), ("{'OMP_NUM_THREADS': '7'}", 7)])
def test_no_more_threads_than_a_container_has_time_for(environment: str, threads: int) -> None:
    code = f"""
import torch
from mf_train.training import device
device.usable_processors = lambda: 3
torch.set_num_threads(7)
device.limit_threads({environment})
print(torch.get_num_threads())
"""
    assert run_python(code).strip() == str(threads)
