"""launch/train.sbatch on a real SLURM cluster of 2 nodes.

The trainer itself runs in `test_trains_on_two_nodes`. The others put a short program in the place of its python
(MF_PYTHON), to see just what the batch script does: which ranks it starts and where, and what it does with an exit
status and with signals.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "train.sbatch"

# Writes down which rank it is and what it sees.
RECORDER = """
import json, os, socket, sys
names = "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID MASTER_ADDR OMP_NUM_THREADS CUDA_VISIBLE_DEVICES RANK"
seen = {name: os.environ.get(name) for name in names.split()}
with open(f"rank-{seen['SLURM_PROCID']}.json", "w") as file:
    json.dump({**seen, "host": socket.gethostname(), "arguments": sys.argv[1:]}, file)
"""

# Stops as the trainer does: on USR1 or TERM it saves and exits 75. After its first restart it exits at once.
STOPPABLE = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["SLURM_PROCID"]
def stop(number, frame):
    time.sleep(1 + 2 * int(rank))  # ranks leave at different times, and none may be killed meanwhile
    Path(f"saved-{rank}").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    Path(f"resumed-{rank}").touch()
    sys.exit(0)
Path(f"started-{rank}").touch()
time.sleep(120)
"""


def stand_in(folder: Path, program: str) -> str:
    """Writes an executable that runs `program`, for MF_PYTHON."""
    path = folder / "stand-in"
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    return str(path)


def output(folder: Path) -> str:
    """What the jobs of this folder wrote."""
    return "".join(path.read_text() for path in sorted(folder.glob("memoryformer-*.out")))


def wait_for_files(folder: Path, names: set[str], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not names <= {path.name for path in folder.iterdir()}:
        assert time.monotonic() < deadline, f"no {names} after {timeout:g} s\n{output(folder)}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "hosts", "threads"),
    [
        ("--nodes=2 --ntasks-per-node=1", "n1 n2", 4),
        ("--nodes=2 --ntasks-per-node=2", "n1 n1 n2 n2", 2),
        ("--ntasks=2", "n1 n1", 2),
        ("--nodes=2 --partition=gpu --gpus-per-node=2", "g1 g1 g2 g2", 2),
        ("--nodes=2 --partition=gpu --gpus-per-node=1", "g1 g2", 4),
        ("--partition=gpu", "g1 g1", 2),  # no number given: all of the node
    ],
)
def test_starts_one_process_per_task_or_gpu(
    slurm_cluster: Cluster, tmp_path: Path, options: str, hosts: str, threads: int
) -> None:
    arguments = ["config.yaml", "training.output_dir=a folder"]
    number = slurm_cluster.submit(
        *options.split(), SCRIPT, *arguments, cwd=tmp_path, MF_PYTHON=stand_in(tmp_path, RECORDER), RANK="7"
    )
    job = slurm_cluster.wait_for_end(number, 60)
    assert job["JobState"] == "COMPLETED", output(tmp_path)

    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]
    assert [rank["host"] for rank in ranks] == hosts.split()
    for i, rank in enumerate(ranks):
        assert rank["SLURM_PROCID"] == str(i)
        assert rank["SLURM_STEP_NUM_TASKS"] == str(len(ranks))
        assert rank["SLURM_LOCALID"] == str([r["host"] for r in ranks[:i]].count(rank["host"]))
        assert rank["MASTER_ADDR"] == hosts.split()[0]
        assert rank["OMP_NUM_THREADS"] == str(threads)
        assert rank["RANK"] is None  # of whatever the user's shell was in
        assert rank["arguments"] == ["-m", "mf_train", "train", *arguments]
        if "gpu" in options:  # each sees all those of its node
            assert rank["CUDA_VISIBLE_DEVICES"] == ",".join(
                map(str, range(hosts.split().count(rank["host"])))
            )


def test_saves_and_requeues_itself_on_notice(slurm_cluster: Cluster, tmp_path: Path) -> None:
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit("--nodes=2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=python)
    wait_for_files(tmp_path, {"started-0", "started-1"})
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    job = slurm_cluster.wait_for_end(number, 120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert {(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)} == {"SIGUSR1"}
    wait_for_files(tmp_path, {"resumed-0", "resumed-1"}, timeout=1)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm_cluster: Cluster, tmp_path: Path) -> None:
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit("--nodes=2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=python)
    wait_for_files(tmp_path, {"started-0", "started-1"})
    slurm_cluster.run("scancel", str(number))
    wait_for_files(tmp_path, {"saved-0", "saved-1"}, timeout=30)
    time.sleep(2)  # time in which a mistaken requeue would show
    job = slurm_cluster.wait_for_end(number, 60)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), output(tmp_path)


def test_a_failure_is_the_jobs_failure(slurm_cluster: Cluster, tmp_path: Path) -> None:
    python = stand_in(tmp_path, "import sys; sys.exit(2)")
    number = slurm_cluster.submit("--nodes=2", SCRIPT, "no-such.yaml", cwd=tmp_path, MF_PYTHON=python)
    job = slurm_cluster.wait_for_end(number, 60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")


def test_says_how_to_use_it(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = slurm_cluster.wait_for_end(slurm_cluster.submit(SCRIPT, cwd=tmp_path), 60)
    assert job["ExitCode"] == "2:0"
    assert "usage: sbatch" in output(tmp_path)


def test_trains_on_two_nodes(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """Four steps of the quickstart's model, its tables sharded over two nodes."""
    run = tmp_path / "run"
    number = slurm_cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--output={tmp_path}/memoryformer-%j.out",
        SCRIPT,
        "configs/quickstart.yaml",
        "parallel.tensor=2",
        "training.steps=4",
        "training.device=cpu",
        f"training.output_dir={run}",
        cwd=REPOSITORY,
        MF_PYTHON=sys.executable,
        OMP_NUM_THREADS="1",
    )
    job = slurm_cluster.wait_for_end(number, 240)
    assert job["JobState"] == "COMPLETED", output(tmp_path)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["tensor_parallel_bytes_per_token"] > 0 for step in steps)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000000004"
