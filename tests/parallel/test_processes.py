"""Which process this is, from the environment of torchrun, of srun, or of neither."""

from __future__ import annotations

import pytest

from mf_train.errors import UserError
from mf_train.parallel.processes import Process, find_process

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node-[1-2]",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
# what a batch script has outside srun: SLURM_PROCID is there, and is not a task's
BATCH_SCRIPT = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def test_alone() -> None:
    assert find_process({}) == find_process(BATCH_SCRIPT) == Process(0, 1, 0, "127.0.0.1", 0)


def test_torchrun_s_environment_also_inside_srun() -> None:
    expected = Process(5, 8, local_rank=1, master_address="node-1", master_port=29500, local_size=4)
    assert find_process(TORCHRUN) == find_process(SRUN | TORCHRUN) == expected


def test_restarts_by_torchrun_are_refused() -> None:
    assert find_process(TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "0"}) == find_process(TORCHRUN)
    with pytest.raises(UserError, match=r"--max-restarts=3: .* leave the option out"):
        find_process(TORCHRUN | {"TORCHELASTIC_MAX_RESTARTS": "3"})


def test_srun_s_environment() -> None:
    process = find_process(SRUN | {"MASTER_ADDR": "node-1"})
    assert (process.rank, process.world_size, process.local_rank) == (5, 8, 1)
    assert process.master_address == "node-1" and 1024 < process.master_port < 65536
    other_rank = find_process(SRUN | {"MASTER_ADDR": "node-1", "SLURM_PROCID": "0"})
    assert other_rank.master_port == process.master_port
    assert find_process(SRUN | {"MASTER_ADDR": "n", "MASTER_PORT": "1234"}).master_port == 1234
    assert find_process(SRUN | {"MASTER_ADDR": "n", "SLURM_NTASKS_PER_NODE": "4"}).local_size == 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            {name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"},
            "MASTER_ADDR is missing",
        ),
        (
            {name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"},
            "MASTER_PORT is missing",
        ),
        (TORCHRUN | {"RANK": "first"}, "RANK is 'first': expected a whole number"),
        (
            {name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"},
            "SLURM_LOCALID is missing",
        ),
        (SRUN | {"MASTER_ADDR": "n", "MASTER_PORT": ""}, "MASTER_PORT is '': expected a whole number"),
    ],
    ids=["no address", "no port", "rank", "no local id", "port"],
)
def test_incomplete_environments_are_refused(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=f"^environment: {expected}"):
        find_process(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node-[1-2]", "node-1"),
        ("gpu[007,009-012],gpu100", "gpu007"),
        ("login,node[1-2]", "login"),
        ("rack[2-3]n[08-11]", "rack2n08"),
        ("n1.cluster.example", "n1.cluster.example"),
    ],
)
def test_rank_0_of_a_step_is_on_its_first_node(nodes: str, first: str) -> None:
    assert find_process(SRUN | {"SLURM_STEP_NODELIST": nodes}).master_address == first
    assert find_process(SRUN | {"SLURM_JOB_NODELIST": nodes}).master_address == first


def test_steps_beside_each_other_have_ports_of_their_own() -> None:
    steps = [find_process(SRUN | {"SLURM_STEP_ID": str(step)}) for step in range(100)]
    assert len({step.master_port for step in steps}) == 100
    one_task = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "MASTER_PORT": "29500"}
    assert find_process(one_task).master_port == 0  # any that is free


def test_a_list_without_nodes_asks_for_the_address() -> None:
    with pytest.raises(UserError, match="nodes is '': set MASTER_ADDR"):
        find_process(SRUN | {"SLURM_STEP_NODELIST": ""})
