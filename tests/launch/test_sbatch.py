"""The job script, by hand with plain sbatch, on a real SLURM cluster.

The trainer itself runs in `test_trains_on_two_nodes`. The others put a short program in its place, to see just what the
script does: which processes it starts and where, and what it does with their ends and with signals. `test_drills.py`
has the real trainer in trouble.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.launching import stand_in
from tests.training.runs import wait_for

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "launch" / "train.sbatch"

# Writes down which process it is and what it sees.
RECORDER = """
names = "SLURM_NODEID OMP_NUM_THREADS CUDA_VISIBLE_DEVICES".split()
import resource
seen = {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)}
seen |= {**vars(process), **{name: os.environ.get(name) for name in names}, "host": os.uname().nodename}
Path(f"rank-{process.rank}.json").write_text(json.dumps({**seen, "arguments": sys.argv[1:]}))
"""

# Stops as the trainer does: on USR1 or TERM it saves and exits 75. After its first restart it exits at once.
STOPPABLE = """
def stop(number, frame):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(1 + 2 * process.rank)  # ranks leave at different times, and none may be killed meanwhile
    Path(f"saved-{process.rank}").write_text(signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
if os.environ.get("SLURM_RESTART_COUNT", "0") != "0":
    Path(f"resumed-{process.rank}").touch()
    sys.exit(0)
Path(f"started-{process.rank}").touch()
time.sleep(120)
"""

# Ends its Nth start with the Nth word of the file `ends`: a status, or one for each rank as in 75/2, after a new
# checkpoint where a + stands before it. "lost": the rank and the process that waits for it are killed.
SCRIPTED = """
start = int(logs.name.rpartition("-")[2])
end = Path("ends").read_text().split()[start - 1]
if process.rank == 0:
    with open("seen", "a") as seen:
        seen.write(f"{start} {os.environ['SLURM_JOB_END_TIME']} {os.environ['MF_NOTICE_SECONDS']}\\n")
    if end.startswith("+"):
        Path("run/checkpoints").mkdir(exist_ok=True)
        Path("run/checkpoints/latest").write_text(f"step-{start:09d}\\n")
end = end.split("/")[-1 if process.rank else 0]
if end == "lost":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
sys.exit(int(end))
"""


def output(folder: Path) -> str:
    """What the jobs of this folder wrote."""
    return "".join(path.read_text() for path in sorted(folder.glob("memoryformer-*.out")))


def starts(folder: Path) -> list[list[str]]:
    """The lines of the run's starts.tsv: time, job, start, event, nodes, processes, checkpoint, status, next."""
    return [line.split("\t") for line in (folder / "run/launch/starts.tsv").read_text().splitlines()]


def wait_for_files(folder: Path, names: set[str], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not names <= {path.name for path in folder.iterdir()}:
        assert time.monotonic() < deadline, f"no {names} after {timeout:g} s\n{output(folder)}"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("starter", "options", "hosts", "threads"),
    [
        ("srun", "--nodes=2 --ntasks-per-node=1", "n1 n2", 4),
        ("srun", "--nodes=2 --ntasks-per-node=2", "n1 n1 n2 n2", 2),
        ("srun", "--ntasks=2", "n1 n1", 2),
        ("srun", "--nodes=2 --partition=gpu --gpus-per-node=2", "g1 g1 g2 g2", 2),
        ("srun", "--nodes=2 --partition=gpu --gpus-per-node=h100:1", "g1 g2", 4),
        ("srun", "--partition=gpu", "g1 g1", 2),  # no number given: all of the node
        ("torchrun", "--nodes=2 --ntasks-per-node=2", "n1 n1 n2 n2", 2),
        ("torchrun", "--nodes=2 --partition=gpu --gpus-per-node=2", "g1 g1 g2 g2", 2),
    ],
)
def test_starts_one_process_per_task_or_gpu(
    slurm_cluster: Cluster, tmp_path: Path, starter: str, options: str, hosts: str, threads: int
) -> None:
    arguments = ["config.yaml", "training.output_dir=a folder"]
    number = slurm_cluster.submit(
        *options.split(),
        SCRIPT,
        *arguments,
        cwd=tmp_path,
        MF_PYTHON=str(stand_in(tmp_path, RECORDER)),
        MF_STARTER=starter,
        RANK="7",
    )
    job = slurm_cluster.wait_for_end(number, 60)
    assert job["JobState"] == "COMPLETED", output(tmp_path)

    ranks = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.json"))]
    assert [rank["host"] for rank in ranks] == hosts.split()
    for i, rank in enumerate(ranks):
        assert (rank["rank"], rank["world_size"]) == (i, len(ranks))
        assert rank["local_rank"] == [r["host"] for r in ranks[:i]].count(rank["host"])
        assert rank["SLURM_NODEID"] == str(sorted(set(hosts.split())).index(rank["host"]))
        assert rank["master_address"] == hosts.split()[0]
        assert rank["OMP_NUM_THREADS"] == str(threads)
        assert rank["arguments"] == [f"run/launch/logs/{number}-1", "--", "train", *arguments]
        if "gpu" in options:  # each sees all those of its node, or of those that were asked for
            assert rank["CUDA_VISIBLE_DEVICES"] == ",".join(
                map(str, range(hosts.split().count(rank["host"])))
            )


def test_the_limit_of_open_files_is_raised(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """SLURM hands on that of the shell that submitted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        python = str(stand_in(tmp_path, RECORDER))
        number = slurm_cluster.submit(
            SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=python, MF_STARTER="srun"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    slurm_cluster.wait_for_end(number, 60)
    raised, most = json.loads((tmp_path / "rank-0.json").read_text())["open_files"]
    assert raised == (65536 if most == resource.RLIM_INFINITY else min(65536, most))


@pytest.mark.parametrize("starter", [pytest.param("srun", marks=pytest.mark.slow), "torchrun"])
def test_saves_and_requeues_itself_on_notice(slurm_cluster: Cluster, tmp_path: Path, starter: str) -> None:
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit(
        "--nodes=2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python), MF_STARTER=starter
    )
    wait_for_files(tmp_path, {"started-0", "started-1"})
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    job = slurm_cluster.wait_for_end(number, 120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert {(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)} == {"SIGUSR1"}
    wait_for_files(tmp_path, {"resumed-0", "resumed-1"}, timeout=1)
    assert [line[2:6] + line[7:] for line in starts(tmp_path)] == [
        ["1", "started", "n[1-2]", "2", "-", "-"],
        ["1", "ended", "n[1-2]", "2", "75", "requeue"],
        ["2", "started", "n[1-2]", "2", "-", "-"],
        ["2", "ended", "n[1-2]", "2", "0", "done"],
    ]


def test_a_cancelled_job_saves_and_stays_cancelled(slurm_cluster: Cluster, tmp_path: Path) -> None:
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit("--nodes=2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python))
    wait_for_files(tmp_path, {"started-0", "started-1"})
    slurm_cluster.run("scancel", str(number))
    wait_for_files(tmp_path, {"saved-0", "saved-1"}, timeout=30)
    time.sleep(2)  # time in which a mistaken requeue would show
    job = slurm_cluster.wait_for_end(number, 60)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), output(tmp_path)


def test_stopped_on_request_it_stays_out_of_the_queue(slurm_cluster: Cluster, tmp_path: Path) -> None:
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit("--nodes=2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python))
    wait_for_files(tmp_path, {"started-0", "started-1"})
    (tmp_path / f"run/launch/stop-{number}").touch()
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    job = slurm_cluster.wait_for_end(number, 60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), output(tmp_path)
    assert starts(tmp_path)[-1][7:] == ["75", "stopped"]


def test_a_request_that_came_before_the_script_counts(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """As while a node was made ready, or where SLURM requeued the job before it could look."""
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit("--hold", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python))
    (tmp_path / "run/launch").mkdir(parents=True)
    (tmp_path / f"run/launch/stop-{number}").touch()
    slurm_cluster.run("scontrol", "release", str(number))
    job = slurm_cluster.wait_for_end(number, 60)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "75:0"), output(tmp_path)
    assert "stopped as asked for" in output(tmp_path) and not (tmp_path / "started-0").exists()


@pytest.mark.parametrize(
    ("ends", "state", "code", "restarts", "nexts", "says"),
    [
        # a mistake is not tried again
        ("2", "FAILED", "2:0", 0, "ends", "not tried again"),
        # a failure is, at once
        ("1 0", "COMPLETED", "0:0", 0, "retry done", "failed with status 1"),
        # srun's status is the greatest: 75 hides the others
        ("75/2", "FAILED", "2:0", 0, "ends", "not tried again"),
        ("1/75 0", "COMPLETED", "0:0", 0, "retry done", "failed with status 1"),
        ("0/lost 75/lost 0", "COMPLETED", "0:0", 0, "retry retry done", "rank 1 on n2 left no ending"),
        # not for ever: three starts from the same checkpoint
        (
            "1 137 1",
            "FAILED",
            "1:0",
            0,
            "retry retry ends",
            "3 starts in a row ended without a new checkpoint",
        ),
        # a new checkpoint begins the count anew
        ("1 1 +1 1 0", "COMPLETED", "0:0", 0, "retry retry retry retry done", "step-000000003"),
        # stopped before it could save, again and again
        pytest.param(
            "75 75 75", "FAILED", "1:0", 2, "requeue requeue ends", "a longer --time", marks=pytest.mark.slow
        ),
        ("+75 75 0", "COMPLETED", "0:0", 2, "requeue requeue done", "from checkpoint step-000000001"),
    ],
)
def test_goes_on_as_long_as_there_is_progress(
    slurm_cluster: Cluster,
    tmp_path: Path,
    ends: str,
    state: str,
    code: str,
    restarts: int,
    nexts: str,
    says: str,
) -> None:
    (tmp_path / "ends").write_text(ends)
    python = stand_in(tmp_path, SCRIPTED)
    number = slurm_cluster.submit(
        "--nodes=2",
        "--time=10",
        SCRIPT,
        "config.yaml",
        cwd=tmp_path,
        MF_PYTHON=str(python),
        MF_STARTER="srun",
    )
    submitted = time.time()
    job = slurm_cluster.wait_for_end(number, 120)
    printed = output(tmp_path)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == (state, code, str(restarts)), printed
    assert says in printed
    failures = [start for start, end in enumerate(ends.split(), 1) if end.strip("+") not in ("0", "75")]
    assert re.findall(rf"  log: run/launch/logs/{number}-(\d+)/rank", printed) == list(map(str, failures))
    ended = [line for line in starts(tmp_path) if line[3] == "ended"]
    assert " ".join(line[8] for line in ended[: len(nexts.split())]) == nexts
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert [int(line[0]) for line in seen] == list(range(1, len(ends.split()) + 1))
    assert all(submitted + 590 < int(line[1]) < time.time() + 610 for line in seen)  # of --time=10, minutes
    assert all(line[2] == "120" for line in seen)


def test_a_container_leaves_time_to_be_started_once_more(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "ends").write_text("0")
    script = tmp_path / "script"
    script.write_text(SCRIPT.read_text().replace("srun_options=()", "srun_options=(--quiet)"))
    python = str(stand_in(tmp_path, SCRIPTED))
    submitted = time.time()
    options = ["--time=10", "--job-name=memoryformer"]
    number = slurm_cluster.submit(
        *options, script, "config.yaml", cwd=tmp_path, MF_PYTHON=python, MF_STARTER="srun"
    )
    assert slurm_cluster.wait_for_end(number, 60)["JobState"] == "COMPLETED", output(tmp_path)
    _, end, notice = (tmp_path / "seen").read_text().split()
    assert notice == "90" and submitted + 560 < int(end) < time.time() + 580


TASK = """
task = os.environ["SLURM_ARRAY_TASK_ID"]
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
Path(f"started-{task}-{os.environ.get('SLURM_RESTART_COUNT', 0)}").touch()
while not Path("go").exists():
    time.sleep(0.1)
"""


def test_a_task_of_an_array_requeues_itself_alone(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """The task that starts last has the whole array's number."""
    python = stand_in(tmp_path, TASK)
    array = slurm_cluster.submit("--array=0-2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python))
    wait_for_files(tmp_path, {f"started-{task}-0" for task in range(3)})
    numbers = {task: slurm_cluster.job(f"{array}_{task}")["JobId"] for task in range(3)}
    (last,) = [task for task, number in numbers.items() if number == str(array)]
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_{last}")
    wait_for_files(tmp_path, {f"started-{last}-1"})
    (tmp_path / "go").touch()
    for task in range(3):
        job = slurm_cluster.wait_for_end(f"{array}_{task}", 60)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(int(task == last))), output(tmp_path)


def test_a_job_that_a_task_of_an_array_submits_requeues_itself(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    """`sbatch` hands the array's variables on, as from an interactive shell in one of its tasks."""
    waiting = tmp_path / "waiting.sh"
    waiting.write_text("#!/bin/bash\nsleep 60\n")
    array = slurm_cluster.submit("--array=3", waiting, cwd=tmp_path)
    wait_for(lambda: slurm_cluster.job(array)["JobState"] == "RUNNING", seconds=30)
    for outer in (array, 4_000_000):  # the second is long forgotten
        folder = tmp_path / str(outer)
        folder.mkdir()
        number = slurm_cluster.submit(
            *(SCRIPT, "config.yaml"),
            cwd=folder,
            MF_PYTHON=str(stand_in(folder, STOPPABLE)),
            SLURM_ARRAY_JOB_ID=str(outer),
            SLURM_ARRAY_TASK_ID="3",
        )
        wait_for_files(folder, {"started-0"})
        slurm_cluster.run("scancel", "--batch", "--signal=USR1", str(number))
        job = slurm_cluster.wait_for_end(number, 60)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(folder)
    slurm_cluster.run("scancel", str(array))


def slurm_with(folder: Path, scontrol: str) -> str:
    """A PATH whose scontrol does something before, or in the place of, the real one (`$real`)."""
    program = folder / "programs" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/bash\nreal={shutil.which('scontrol')}\n{scontrol}\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


@pytest.mark.slow
def test_a_request_to_stop_counts_while_the_start_is_prepared(slurm_cluster: Cluster, tmp_path: Path) -> None:
    path = slurm_with(tmp_path, 'echo "$@" >> asked; sleep 1; exec $real "$@"')
    python = stand_in(tmp_path, STOPPABLE)
    number = slurm_cluster.submit(
        "--nodes=2", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python), PATH=path
    )
    wait_for_files(tmp_path, {"asked"})
    time.sleep(1.5)  # it has asked for the nodes' names and now asks for the job's end
    assert not (tmp_path / "started-0").exists()
    slurm_cluster.run("scancel", "--batch", "--signal=USR1", str(number))
    job = slurm_cluster.wait_for_end(number, 60)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)


@pytest.mark.slow
def test_waits_for_a_controller_that_does_not_answer(slurm_cluster: Cluster, tmp_path: Path) -> None:
    away = 'if [[ -e seen && "$*" == *"show job"* && $(wc -l < asked) -lt 3 ]]; then exit 1; fi'
    path = slurm_with(tmp_path, f'[[ -e seen ]] && echo "$@" >> asked; {away}; exec $real "$@"')
    (tmp_path / "ends").write_text("+75 0")
    python = stand_in(tmp_path, SCRIPTED)
    number = slurm_cluster.submit(
        "--nodes=2", "--time=10", SCRIPT, "config.yaml", cwd=tmp_path, MF_PYTHON=str(python), PATH=path
    )
    job = slurm_cluster.wait_for_end(number, 120)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), output(tmp_path)
    assert "the controller does not answer: asking again" in output(tmp_path)


def test_says_how_to_use_it(slurm_cluster: Cluster, tmp_path: Path) -> None:
    job = slurm_cluster.wait_for_end(slurm_cluster.submit(SCRIPT, cwd=tmp_path), 60)
    assert job["ExitCode"] == "2:0"
    assert "usage: sbatch" in output(tmp_path)


@pytest.mark.slow
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
    assert "reach over nodes of 1 processes" in output(tmp_path)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(step["tensor_parallel_bytes_per_token"] > 0 for step in steps)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step-000000004"
