"""A rank gets the cores of its GPU's NUMA node or its share, and keeps what its launcher or user has bound it to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from mf_train.parallel.processes import Process
from mf_train.training.binding import bind_cores, choose_cores, parse_list
from tests.launch.test_torchrun import _torchrun
from tests.warm import free_port, start_warm

CORES = sorted(os.sched_getaffinity(0))


def test_lists_of_cores() -> None:
    assert parse_list("0-3,8,10-11\n") == {0, 1, 2, 3, 8, 10, 11}
    assert parse_list("\n") == set()


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Two NUMA nodes of four cores with two threads each: core c of node n has the threads 4 n + c and 8 + 4 n + c."""
    for node in range(2):
        folder = tmp_path / f"node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{4 * node}-{4 * node + 3},{8 + 4 * node}-{11 + 4 * node}\n")
    for cpu in range(16):
        folder = tmp_path / f"cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu % 8 // 4}\n")
        (folder / "core_id").write_text(f"{cpu % 4}\n")
    return tmp_path


def test_a_gpu_s_node_is_all_its_ranks_(system: Path) -> None:
    everything = set(range(16))
    near = {4, 5, 6, 7, 12, 13, 14, 15}
    assert all(choose_cores(everything, rank, 4, 1, system) == near for rank in range(4))
    assert choose_cores(everything - {4, 12}, 0, 4, 1, system) == near - {4, 12}


def test_shares_are_even_and_hold_whole_cores_of_one_node(system: Path) -> None:
    everything = set(range(16))
    assert [choose_cores(everything, rank, 2, None, system) for rank in range(2)] == [
        {0, 1, 2, 3, 8, 9, 10, 11},
        {4, 5, 6, 7, 12, 13, 14, 15},
    ]
    quarters = [choose_cores(everything, rank, 4, None, system) for rank in range(4)]
    assert quarters == [{0, 1, 8, 9}, {2, 3, 10, 11}, {4, 5, 12, 13}, {6, 7, 14, 15}]
    thirds = [choose_cores(everything, rank, 3, None, system) for rank in range(3)]
    assert [len(cores) for cores in thirds] == [5, 5, 5] and len(set.union(*thirds)) == 15


def test_what_is_too_little_is_not_taken(system: Path) -> None:
    assert choose_cores({0, 1, 2, 3, 8}, 0, 3, None, system) == set()
    # none of its GPU's node is allowed: a share of what is
    assert choose_cores({0, 1, 2, 3}, 1, 2, 1, system) == {2, 3}
    # a machine that tells nothing of its nodes
    assert choose_cores({0, 1, 2, 3}, 1, 2, 0, system / "nothing") == {2, 3}


_RANK = """
import json, os, sys, torch
import mf_train.training.binding as binding
from mf_train.parallel.processes import find_process
binding._LEAST_CORES = 1  # this machine may have two
if sys.argv[2] != "all" and os.environ["RANK"] == "1":
    os.sched_setaffinity(0, {int(sys.argv[2])})
bound = binding.bind_cores(find_process(), torch.device("cpu"))
found = sorted(bound), sorted(os.sched_getaffinity(0)), torch.get_num_threads()
open(f"{sys.argv[1]}/{os.environ['RANK']}", "w").write(json.dumps(found))
"""


def under_torchrun(
    folder: Path, own: str = "all", **variables: str
) -> list[tuple[list[int], list[int], int]]:
    """Cores that two ranks are bound to, those that they may use then, and torch's threads."""
    program = folder / "rank.py"
    program.write_text(_RANK)
    options = f"--nproc-per-node=2 --master-addr=127.0.0.1 --master-port={free_port()}"
    agent = start_warm(
        _start, variables, [*options.split(), str(program), str(folder), own], folder / "output"
    )
    agent.join(120)
    assert agent.exitcode == 0, (folder / "output").read_text()
    return [tuple(json.loads((folder / str(rank)).read_text())) for rank in range(2)]


def _start(variables: dict[str, str], arguments: list[str], output: Path) -> None:
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(variables, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    _torchrun(arguments, output)


needs_two = pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")


@needs_two
@pytest.mark.distributed
def test_ranks_under_torchrun_share_its_cores(tmp_path: Path) -> None:
    (first, first_now, threads), (second, second_now, _) = under_torchrun(tmp_path, OMP_NUM_THREADS="64")
    size = len(CORES) // 2
    assert first == first_now and second == second_now
    assert len(first) == len(second) == size and not set(first) & set(second)
    assert threads == size


@needs_two
@pytest.mark.distributed
def test_a_binding_is_kept(tmp_path: Path) -> None:
    (first, _, _), second = under_torchrun(tmp_path, own=str(CORES[-1]))
    assert len(first) == len(CORES) // 2
    assert second[:2] == ([], [CORES[-1]])


@needs_two
@pytest.mark.distributed
def test_who_places_threads_is_left_alone(tmp_path: Path) -> None:
    # of Intel's OpenMP: torch's own here does not bind by it
    assert [cores[:2] for cores in under_torchrun(tmp_path, KMP_AFFINITY="compact")] == [([], CORES)] * 2


def test_without_a_launcher_or_alone_nothing_is_bound() -> None:
    cpu = torch.device("cpu")
    for process, variables in [
        (Process(), {}),
        (Process(0, 2, 0, local_size=2), {"RANK": "0"}),  # started by hand
        (Process(0, 2, 0, local_size=0), {"SLURM_PROCID": "0"}),  # it is not known how many share the node
        (Process(0, 2, 0, local_size=1), {"SLURM_PROCID": "0"}),
    ]:
        assert bind_cores(process, cpu, variables) == set()
    assert sorted(os.sched_getaffinity(0)) == CORES
