"""Real runs, launched as a user does it, on a real SLURM cluster: requests to stop, failures, arrays and chains.

4 ranks on 2 nodes, tensor-parallel inside a node, data-parallel across. Each run must end as an undisturbed one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from tests.faults.drill import newest_step
from tests.launch.cluster import GRACE, Cluster
from tests.launch.conftest import Drill, MakeRun
from tests.launch.drills import INTERVAL, START_SECONDS, Run
from tests.training.runs import read_metrics

Reference = Callable[..., Run]

pytestmark = pytest.mark.slurm
slow = pytest.mark.slow


def ask_to_save(cluster: Cluster, job: int) -> None:
    """What SLURM does itself, by --signal, before the time limit."""
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))


def test_trains(reference: Reference, drill: Drill) -> None:
    """Trains to the end."""
    run = reference()
    assert [entry["step"] for entry in read_metrics(run.folder)] == list(range(1, 17))
    assert all(entry["tensor_parallel_bytes_per_token"] > 0 for entry in read_metrics(run.folder))
    run.check_folder()
    (start,) = run.starts()
    assert (start.nodes, start.processes, start.checkpoint) == ("n[1-2]", 4, "none")
    assert [run.rank_log(start, rank).split()[3] for rank in range(4)] == ["n1", "n1", "n2", "n2"]
    assert (run.notes()[-1].event, run.notes()[-1].status) == ("ended", "0")


@slow
def test_trains_as_tasks_of_srun(make_run: MakeRun, reference: Reference, drill: Drill) -> None:
    """Trains to the end, started by srun."""
    run = make_run()
    run.launch("--starter=srun")
    run.finish()
    run.check_end(reference())


@slow
def test_notice(make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster) -> None:
    """USR1 to the script: saves, requeues, resumes."""
    run = make_run()
    job = run.launch()
    run.wait_for_steps(6)
    event = time.monotonic()
    ask_to_save(slurm_cluster, job)
    drill.recovered(run, event, START_SECONDS)
    assert run.finish()["Restarts"] == "1", run.output()
    drill.lost(run, 0)
    run.check_end(reference())


@slow
@pytest.mark.parametrize("limit", ["notice", "too short a notice"])
def test_time_limit(make_run: MakeRun, reference: Reference, drill: Drill, limit: str) -> None:
    """SLURM's own time limit. A quick machine takes steps of a third of a second; a notice comes up to 30 s early."""
    run = make_run(steps=200)
    run.launch(*(["--time=2", "--notice=60"] if limit == "notice" else ["--time=1", "--notice=5"]))
    job = run.finish(900)
    restarts = int(job["Restarts"])
    assert restarts >= 1
    warned = "is too short" in run.rank_log(run.starts()[0])
    assert warned == (limit != "notice"), run.output()
    drill.lost(run, 0, restarts)
    run.check_end(reference(steps=200))


@slow
def test_stop(make_run: MakeRun, reference: Reference, drill: Drill) -> None:
    """`launch stop` saves and ends; a later launch goes on."""
    run = make_run()
    run.launch()
    run.wait_for_steps(6)
    done = run.memoryformer("launch", "stop", str(run.folder))
    assert done.returncode == 0 and f"job {run.job}: will save and end" in done.stdout, done.stderr
    job = run.end(60)
    assert job["Restarts"] == "0" and not job["JobState"].startswith("CANCEL"), run.output()
    assert newest_step(run.checkpoints) == run.steps(run.starts()[0])[-1]
    assert run.notes()[-1].what_next == "stopped"
    event = time.monotonic()
    run.launch()
    drill.recovered(run, event, START_SECONDS)
    run.finish()
    drill.lost(run, 0)
    run.check_end(reference())


@slow
def test_cancelled(make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster) -> None:
    """scancel: saves and stays cancelled; a later launch goes on."""
    run = make_run()
    run.launch()
    run.wait_for_steps(6)
    slurm_cluster.run("scancel", str(run.job))
    job = run.end(60)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), run.output()
    event = time.monotonic()
    run.launch()
    drill.recovered(run, event, START_SECONDS)
    run.finish()
    drill.lost(run, 0)
    run.check_end(reference())


@slow
def test_preempted(make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster) -> None:
    """Preempted by a job of a higher partition."""
    run = make_run(steps=100)
    run.launch()
    run.wait_for_steps(6)
    event = time.monotonic()
    urgent = slurm_cluster.submit(
        *"--partition=urgent --nodes=4 --exclusive --output=/dev/null --wrap".split(),
        "sleep 2",
        cwd=run.folder,
    )
    assert slurm_cluster.wait_for_end(urgent, GRACE + 60)["JobState"] == "COMPLETED", run.output()
    drill.recovered(run, event, START_SECONDS)
    job = run.finish()
    assert job["Restarts"] == "1", run.output()
    drill.lost(run, 0)
    run.check_end(reference(steps=100))


@slow
def test_no_progress(make_run: MakeRun, drill: Drill, slurm_cluster: Cluster) -> None:
    """Told to stop before its first step, again and again: ends, with the reason."""
    run = make_run()
    job = run.launch()
    for start in (1, 2, 3):
        run.wait_until(
            lambda start=start: len(run.starts()) == start and bool(run.rank_log(run.starts()[-1])),
            f"start {start}",
            60,
        )
        ask_to_save(slurm_cluster, job)
    ended = run.end(60)
    assert ended["JobState"] == "FAILED" and len(run.starts()) == 3, run.output()
    assert "3 starts in a row ended without a new checkpoint (newest: none)" in run.output()
    assert "--time" in run.output()


@slow
def test_crash_loop(make_run: MakeRun, drill: Drill) -> None:
    """Fails in every start: ends after its retries, with the cause."""
    run = make_run(optimizer={"learning_rate": 1e30, "gradient_clip": 0.0})
    run.launch("--retries=1")
    job = run.end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0"), run.output()
    assert len(run.starts()) == 2
    assert len(re.findall(r"memoryformer: step \d+: .* is (nan|inf)", run.output())) >= 2
    assert "2 starts in a row ended without a new checkpoint" in run.output()


@slow
def test_mistake(make_run: MakeRun, drill: Drill, slurm_cluster: Cluster) -> None:
    """A mistake (status 2) is not tried again, and what waits for its success is cancelled."""
    run = make_run()
    mistaken = run.folder.parent / "text.jsonl"
    mistaken.write_text('{"text": "some words"}\n')
    first = run.launch("--sbatch=--hold", f"data.train=[{{path: {mistaken}}}]")
    after = make_run(name="after")
    after.launch(f"--dependency=afterok:{first}")
    mistaken.unlink()
    slurm_cluster.run("scontrol", "release", str(first))
    job = run.end(60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), run.output()
    assert len(run.starts()) == 1
    assert f"memoryformer: {mistaken}" in run.output() or str(mistaken) in run.output()
    assert slurm_cluster.wait_for_end(after.job, 60)["JobState"] == "CANCELLED"
    assert not after.starts()


@slow
@pytest.mark.parametrize(("rank", "starter"), [(3, "torchrun"), (0, "srun")])
def test_rank_killed(make_run: MakeRun, reference: Reference, drill: Drill, rank: int, starter: str) -> None:
    """kill -9 of a rank: started again in place."""
    run = make_run()
    run.launch(f"--starter={starter}")
    run.wait_for_steps(6)
    event = time.monotonic()
    run.signal(run.rank(rank), "KILL")
    drill.recovered(run, event, START_SECONDS)
    assert run.finish()["Restarts"] == "0", run.output()
    assert f"rank {rank} on n{1 + rank // 2}" in run.output()
    drill.lost(run, INTERVAL)
    run.check_end(reference())


@slow
@pytest.mark.parametrize(
    ("rank", "starter", "named"),
    [
        (3, "torchrun", r"no progress for \d+ s: rank 3 on n2 .* step \d+"),
        (0, "srun", r"rank 0, .* at n1:\d+ does not answer and no progress for \d+ s"),
    ],
    ids=["3-torchrun", "0-srun"],
)
def test_rank_stopped(
    make_run: MakeRun, reference: Reference, drill: Drill, rank: int, starter: str, named: str
) -> None:
    """SIGSTOP of a rank: named, and started again in place."""
    limit = 20  # seconds
    run = make_run(training={"collective_timeout_seconds": limit})
    run.launch(f"--starter={starter}")
    run.wait_for_steps(6)
    event = time.monotonic()
    run.signal(run.rank(rank), "STOP")
    drill.recovered(run, event, 2 * limit + START_SECONDS)
    assert run.finish()["Restarts"] == "0", run.output()
    assert re.search(f"{named}", run.output()), run.output()
    drill.lost(run, INTERVAL)
    run.check_end(reference())


@slow
def test_array(make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster) -> None:
    """An array of 3 seeds."""
    run = make_run(name="seed-{task}")
    array = run.launch("--array=0-2", "training.seed={task}", nodes=1)
    runs = [make_run(name=f"seed-{task}") for task in range(3)]
    for task, member in enumerate(runs):
        job = slurm_cluster.wait_for_end(f"{array}_{task}", 240)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), member.output()
    losses = [[entry["loss"] for entry in read_metrics(member.folder)] for member in runs]
    assert len({losses[task][0] for task in range(3)}) == 3
    runs[0].check_end(reference(), relative=1e-5)  # its seed is 0, its nodes are fewer
    for member in runs:
        member.check_folder()


@slow
def test_chain(make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster) -> None:
    """A chain of jobs on one run: the second goes on when the first has gone."""
    run = make_run()
    first = run.launch()
    second = run.launch(f"--dependency=afterany:{first}")
    third = run.launch(f"--dependency=afterok:{second}")
    run.wait_for_steps(6)
    event = time.monotonic()
    slurm_cluster.run("scancel", str(first))
    drill.recovered(run, event, START_SECONDS)
    run.finish()
    assert [start.job for start in run.starts()] == [str(first), str(second), str(third)]
    assert "nothing to do" in run.rank_log(run.starts()[-1])
    drill.lost(run, 0)
    run.check_end(reference())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--partition=no-such"], ["no-such", "main", "urgent"]),
        (["parallel.tensor=4"], ["parallel.tensor 4", "--tasks-per-node"]),
        (["--nodes=5"], ["--nodes 5", "4 nodes"]),
        (["training.global_batch_size=1"], ["global_batch_size"]),
        (["model.hidden_size=65536", "model.num_layers=99"], ["does not fit"]),
    ],
)
def test_refused(make_run: MakeRun, slurm_cluster: Cluster, arguments: list[str], words: list[str]) -> None:
    """What cannot work is refused in one line, nothing is submitted and nothing is left."""
    run = make_run()
    done = run.memoryformer("launch", str(run.config), "--nodes=2", "--tasks-per-node=2", *arguments)
    (complaint,) = [line for line in done.stderr.splitlines() if not line.startswith("memoryformer: warning")]
    assert done.returncode == 2 and all(word in complaint for word in words), done.stderr
    assert not run.folder.exists()
    assert slurm_cluster.run("squeue", "--noheader") == ""


def test_no_configuration(make_run: MakeRun) -> None:
    run = make_run()
    done = run.memoryformer("launch", "no-such.yaml", "--nodes=2", "--tasks-per-node=2")
    assert done.returncode == 2 and done.stderr.startswith("memoryformer: no-such.yaml"), done.stderr
