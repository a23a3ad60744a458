"""What the processes of a check measure, in real processes on this machine that stand for two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_train.kernels import describe
from mf_train.launch.preflight import MARK, PIECE, links_of, main, read_file, write_file
from mf_train.parallel.launcher import end_with_parent
from tests.warm import free_port, start_warm

REPOSITORY = Path(__file__).resolve().parents[2]


def measure(
    folder: Path, per_node: int, kind: str = "cpu", world: int | None = None, cold: bool = False
) -> tuple[list[int], list[dict[str, Any]]]:
    """Exit statuses of processes of two nodes, a and b, and the lines they printed; ends those that take longer.

    `world` is what they are told that there are. `cold`: as srun starts them, rather than forks of tests/warm.py.
    """
    shared = {
        "SLURM_JOB_ID": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "SLURM_STEP_NUM_NODES": "2",
    }
    shared |= {"SLURM_STEP_NUM_TASKS": str(world or 2 * per_node), "OMP_NUM_THREADS": "1"}
    processes, lines = [], []
    with tempfile.TemporaryDirectory() as outputs:
        try:
            for rank in range(2 * per_node):
                own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % per_node)}
                own |= {"SLURMD_NODENAME": "ab"[rank // per_node]}
                environment, output = {**os.environ, **shared, **own}, f"{outputs}/{rank}"
                processes.append(start_warm(run_process, environment, output, cold, str(folder), kind))
            for process in processes:
                process.join(120)
        finally:
            for process in processes:
                process.kill()
                process.join()
        for rank in range(2 * per_node):
            text = Path(outputs, str(rank)).read_text()
            assert all(len(line) < 1000 for line in text.splitlines())
            lines += [
                json.loads(line.removeprefix(MARK)) for line in text.splitlines() if line.startswith(MARK)
            ]
    return [process.exitcode for process in processes], lines


def run_process(environment: dict[str, str], output: str, cold: bool, folder: str, kind: str) -> None:
    end_with_parent()
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), 1)
    if cold:
        os.chdir(REPOSITORY)
        command = [sys.executable, "-m", "mf_train.launch.preflight", folder, str(PIECE), kind]
        os.execve(sys.executable, command, environment)
    os.environ.clear()
    os.environ.update(environment)
    main(Path(folder), PIECE, kind)


def values(lines: list[dict[str, Any]], key: str) -> dict[int, Any]:
    """What each rank said."""
    return {line["rank"]: line[key] for line in lines if key in line}


@pytest.mark.distributed
def test_two_nodes_of_two_processes_measure_everything(tmp_path: Path) -> None:
    statuses, lines = measure(tmp_path, 2, cold=True)
    assert statuses == [0, 0, 0, 0]
    for key, ranks in {
        "copy": {0, 1, 2, 3},
        "inside": {0, 1, 2, 3},
        "across": {0, 1, 2, 3},
        "link": {0, 1},  # between two nodes there is one link, which the first node tells
        "write": {0, 2},
        "read": {0, 2},
        "seen": {0, 2},
        "skew": {2},
    }.items():
        assert set(values(lines, key)) == ranks, key
    assert all(0.001 < rate < 1000 for rate in values(lines, "link").values())
    assert all(1e5 < rate < 1e11 for rate in values(lines, "write").values())
    assert abs(values(lines, "skew")[2]) < 0.1  # it is one clock
    assert {line["rank"] for line in lines if line["stage"] == "done"} == {0, 1, 2, 3}
    assert {line["rank"] for line in lines if line["stage"] == "kernel"} == {0, 1, 2, 3}
    kinds = [
        line["versions"]["hash and lookup"]
        for line in lines
        if line["stage"] == "kernel" and "versions" in line
    ]
    assert kinds == [describe(torch.device("cpu"))] * 2
    told = [
        line["problem"] for line in lines if "problem" in line
    ]  # this machine may know itself as 127.0.0.1 only
    assert all("gloo" in problem for problem in told)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.distributed
def test_storage_that_is_too_small_is_told_by_each_node(small_disk: Path) -> None:
    statuses, lines = measure(small_disk, 1)
    assert statuses == [0, 0]  # all else can be measured
    problems = values([line for line in lines if line["stage"] == "storage"], "problem")
    assert set(problems) == {0, 1}
    assert all(
        "No space left on device" in problem and str(small_disk) in problem for problem in problems.values()
    )
    assert not values(lines, "write") and not list(small_disk.glob("data-*"))
    assert all(line["resources"]["free"] <= 2**20 for line in lines if "resources" in line)


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    statuses, lines = measure(tmp_path / "missing", 1)
    assert statuses == [1, 1]
    assert all(line["during"] == "node" and "all nodes share" in line["error"] for line in lines)


def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    statuses, lines = measure(tmp_path, 1, kind="cuda")
    assert statuses == [1, 1]
    assert [line["error"] for line in lines if line["stage"] == "failed"] == [
        "UserError: local rank 0 has no GPU of its own (0 visible): start one process for each GPU"
    ] * 2


@pytest.mark.slow
def test_those_that_wait_for_a_lost_process_end(tmp_path: Path) -> None:
    statuses, lines = measure(tmp_path, 1, world=4)
    assert statuses == [1, 1]
    errors = [(line["during"], line["error"].split(":")[0]) for line in lines if line["stage"] == "failed"]
    assert errors[0] == ("met", "TimeoutError")
    assert len(errors) == 2


@pytest.mark.parametrize("nodes", range(1, 12))
def test_every_link_of_the_ring_is_measured_once_and_links_of_a_turn_share_no_node(nodes: int) -> None:
    measured = []
    for turn in range(3):
        found = {node: links_of(node, nodes, turn) for node in range(nodes)}
        for node, links in found.items():
            assert len(links) <= 1
            for link, peer in links:
                assert found[peer] == [(link, node)]
                assert {node, peer} == {link, (link + 1) % nodes}
        measured += sorted({link for links in found.values() for link, _ in links})
    assert sorted(measured) == list(range({1: 0, 2: 1}.get(nodes, nodes)))


def test_reads_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "data"
    written, rate = write_file(path, 2 * PIECE, seed=1)
    assert (written, path.stat().st_size) == (2 * PIECE, 2 * PIECE)
    assert rate > 0 and read_file(path, written, seed=1) > 0
    with pytest.raises(OSError, match="has 8388608 bytes here and 4194304 where it was written"):
        read_file(path, PIECE, seed=1)
    with pytest.raises(OSError, match="not what was written"):
        read_file(path, written, seed=2)
    with path.open("r+b") as file:
        file.seek(PIECE + 5)
        file.write(b"changed")
    with pytest.raises(OSError, match="is read at byte 4194304"):
        read_file(path, written, seed=1)
