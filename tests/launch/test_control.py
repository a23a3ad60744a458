"""`memoryformer launch status`, `stop` and `logs`."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mf_train.errors import UserError
from mf_train.launch.control import logs, status, stop
from mf_train.launch.launch_folder import read_starts
from mf_train.launch.logs import Ending, format_ending, format_head, rank_log
from mf_train.run_folder import last_metrics
from mf_train.text import duration
from tests.launch.cluster import Cluster
from tests.launch.launching import SIZE, Launcher, on_cluster, stand_in, without_slurm

# Trains until it is asked to stop; saves and ends with 75 then. A later start is done at once.
TRAINER = """
run = Path(sys.argv[-1]).parent.parent
def stop(number, frame):
    (run / f"saved-{process.rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.signal(signal.SIGTERM, stop)
if (run / f"saved-{process.rank}").exists():
    sys.exit(0)
(run / "metrics.jsonl").write_text('{"step": 3, "loss": 2.5, "tokens_per_second": 1234.5}\\n')
(run / f"started-{process.rank}").touch()
print("training", flush=True)
time.sleep(120)
"""


@pytest.fixture
def launch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.chdir(tmp_path)
    return Launcher(tmp_path, capsys)


def wait_for(*paths: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"no {paths} after {seconds:g} s"
        time.sleep(0.1)


def started(start: int, checkpoint: str, job: str = "12") -> str:
    return f"2026-01-02T03:04:0{start}+0000\t{job}\t{start}\tstarted\tn[1-2]\t4\t{checkpoint}\t-\t-\n"


def ended(start: int, checkpoint: str, code: int, following: str, job: str = "12") -> str:
    return f"2026-01-02T04:05:1{start}+0000\t{job}\t{start}\tended\tn[1-2]\t4\t{checkpoint}\t{code}\t{following}\n"


class TestWithoutSlurm:
    """A run whose job SLURM has forgotten, or seen from a machine without SLURM: its files tell."""

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        without_slurm(tmp_path, monkeypatch)
        folder = tmp_path / "run"
        (folder / "launch" / "logs").mkdir(parents=True)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text("step-000000008\n")
        record = {"job": "12", "before": [], "common": str(folder)}
        (folder / "launch" / "job.json").write_text(json.dumps(record))
        (folder / "launch" / "config.yaml").write_text("training: {steps: 20}\n")
        (folder / "launch" / "starts.tsv").write_text(
            started(1, "none") + ended(1, "step-000000008", 75, "requeue") + started(2, "step-000000008")
        )
        metrics = [{"step": n, "loss": 4 - n / 10, "tokens_per_second": 5000.0} for n in range(1, 10)]
        text = "".join(json.dumps(line) + "\n" for line in metrics)
        (folder / "metrics.jsonl").write_text(text + '{"step": 10, "lo')
        (folder / "launch" / "logs" / "12.out").write_text("".join(f"line {n}\n" for n in range(100)))
        return folder

    def fail(self, run: Path) -> None:
        """The second start's rank 1 ends with an error, and is the cause of rank 0's end."""
        with (run / "launch" / "starts.tsv").open("a") as file:
            file.write(ended(2, "step-000000008", 1, "ends"))
        folder = run / "launch" / "logs" / "12-2"
        folder.mkdir()
        for rank, words in ((0, "Connection reset"), (1, "memoryformer: no luck")):
            end = format_ending(Ending(rank, "n1", 1, time.time()))
            rank_log(folder, rank).write_text(f"{format_head(rank, 'n1', 'pid 1')}\n{words}\n{end}\n")
        (folder / "node-000.log").touch()

    def test_status(self, run: Path) -> None:
        told = list(status(run))
        assert told[0] == f"run         {run}"
        assert told[1].startswith("job         12: SLURM is not installed")
        assert told[2].startswith("step        9 of 20, loss 3.1000, 5,000 tokens/s, recorded 0:00:0")
        assert told[3] == "checkpoint  step-000000008"
        assert told[4] == (
            "start       12-1 at 2026-01-02T03:04:01+0000, 4 processes on n[1-2], from none: ended after 1:01:10 with "
            "status 75, newest step-000000008: requeue"
        )
        assert told[5].startswith("start       12-2") and told[5].endswith(
            "from step-000000008: no end noted"
        )
        assert told[6] == f"logs        {run}/launch/logs/12.out"
        assert len(told) == 7

    def test_status_names_the_first_error_of_a_failed_start(self, run: Path) -> None:
        self.fail(run)
        (line,) = [line for line in status(run) if line.startswith("error")]
        assert "rank 1 on n1" in line and "no luck" in line

    @pytest.mark.parametrize(
        "text",
        [
            "[1]",
            "{}",
            "null",
            '{"before": []}',
            '{"job": 12}',
            '{"job": "12", "before": null}',
            '{"job": "12", "before": [11]}',
            '{"job": "12", "common": 1}',
            '{"job": "12", "runs": []}',
            '{"job": "12", "runs": {}}',
            '{"job": "12", "runs": {"a": "run"}}',
            '{"job": "12", "runs": {"0": null}}',
            "[" * 100_000,
        ],
        ids=lambda text: text[:40],
    )
    def test_a_record_that_launch_does_not_write_is_damaged(self, run: Path, text: str) -> None:
        path = run / "launch" / "job.json"
        path.write_text(text)
        for ask in (status, stop):
            with pytest.raises(UserError, match=f"{path}: is damaged; delete it if no job of this run"):
                list(ask(run))

    def test_the_launch_folder_is_the_run_too(self, run: Path) -> None:
        assert next(status(run / "launch")) == f"run         {run}"

    def test_status_of_a_run_that_has_not_begun(self, run: Path) -> None:
        for name in ("metrics.jsonl", "checkpoints/latest", "launch/starts.tsv"):
            (run / name).unlink()
        told = list(status(run))
        assert told[2:4] == ["step        none of 20", "checkpoint  none"]

    def test_status_of_an_array_is_a_line_a_task(self, run: Path, tmp_path: Path) -> None:
        common = tmp_path / "array" / "launch"
        common.mkdir(parents=True)
        (common / "job.json").write_text(
            json.dumps({"job": "12", "runs": {"0": str(run), "1": str(tmp_path / "b")}})
        )
        told = list(status(tmp_path / "array"))
        assert told[0] == f"array       12 (2 tasks), {tmp_path / 'array'}"
        assert (
            told[1].startswith("task 0      SLURM is not here: step 9 of 20") and "step-000000008" in told[1]
        )
        assert told[2].startswith("task 1      SLURM is not here: step none")

    @pytest.mark.parametrize("command", [lambda path: status(path), lambda path: stop(path)])
    def test_a_folder_that_nothing_was_launched_for(self, run: Path, tmp_path: Path, command: Any) -> None:
        with pytest.raises(UserError, match="nowhere: no such folder"):
            list(command(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="no job was launched for this folder"):
            list(command(run / "checkpoints"))

    def test_stop_needs_slurm(self, run: Path) -> None:
        with pytest.raises(UserError, match="SLURM is not installed"):
            list(stop(run))

    def test_logs_are_the_jobs_last_lines(self, run: Path) -> None:
        told = list(logs(run, rank=None, start=None, lines=3, follow=False))
        assert told == [f"==> {run}/launch/logs/12.out <==", "line 97", "line 98", "line 99"]

    def test_logs_of_the_job_before_while_a_new_one_waits(self, run: Path) -> None:
        record = {"job": "13", "before": [], "common": str(run)}
        (run / "launch" / "job.json").write_text(json.dumps(record))
        assert next(logs(run, rank=None, start=None, lines=3, follow=False)).endswith("12.out <==")

    def test_logs_of_a_failed_run_begin_with_its_first_error(self, run: Path) -> None:
        self.fail(run)
        told = list(logs(run, rank=None, start=None, lines=1, follow=False))
        assert told[0] == "start 2 of job 12 ended with status 1: ends"
        assert told[1].startswith("first error: rank 1 on n1 ended with status 1")
        assert told[-2:] == [f"==> {run}/launch/logs/12.out <==", "line 99"]

    def test_logs_of_a_rank(self, run: Path) -> None:
        self.fail(run)
        told = list(logs(run, rank=1, start=2, lines=2, follow=False))
        assert told[-3] == f"==> {run}/launch/logs/12-2/rank-00001.log <=="
        assert told[-2] == "memoryformer: no luck"

    @pytest.mark.parametrize(
        ("rank", "start", "expected"),
        [
            (7, None, "rank-00007.log: there is no such log yet"),
            (0, 5, "there is no start 5"),
            (None, 1, "--rank"),
        ],
    )
    def test_logs_that_are_not_there(
        self, run: Path, rank: int | None, start: int | None, expected: str
    ) -> None:
        self.fail(run)
        with pytest.raises(UserError, match=expected):
            list(logs(run, rank=rank, start=start, lines=3, follow=False))

    def test_a_line_that_was_cut_is_passed_over(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"step": 1}\n{"step": 2}\n{"st')
        assert last_metrics(tmp_path) == {"step": 2}
        (tmp_path / "launch").mkdir()
        (tmp_path / "launch" / "starts.tsv").write_text(started(1, "none") + started(2, "none")[:30])
        assert [start.number for start in read_starts(tmp_path)] == [1]

    @pytest.mark.parametrize(
        ("seconds", "text"), [(5, "0:00:05"), (3723.9, "1:02:03"), (93784, "1-02:03:04")]
    )
    def test_durations(self, seconds: float, text: str) -> None:
        assert duration(seconds) == text


@pytest.mark.slurm
class TestOnACluster:
    @pytest.fixture(autouse=True)
    def cluster(self, slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
        on_cluster(slurm_cluster, monkeypatch)
        return slurm_cluster

    def submit(self, launch: Launcher, *words: str) -> str:
        python = stand_in(launch.folder, TRAINER)
        return launch.submit(*SIZE, "--starter", "srun", "--python", str(python), *words)

    def test_from_waiting_to_ended(self, launch: Launcher, cluster: Cluster) -> None:
        number = self.submit(launch, "--sbatch=--hold")
        assert f"job         {number}: PENDING (JobHeldUser)" in launch("status", launch.run)
        cluster.run("scontrol", "release", number)
        wait_for(*(launch.run / f"started-{rank}" for rank in range(4)))
        told = launch("status", launch.run)
        assert f"job         {number}: RUNNING on n[" in told and " left)" in told
        assert "step        3 of 12, loss 2.5000, 1,234 tokens/s" in told
        assert f"start       {number}-1 at " in told and "no end noted" in told

        assert f"job {number}: will save and end" in launch("stop", launch.run)
        job = cluster.wait_for_end(int(number), 60)
        assert job["Restarts"] == "0"  # not requeued
        assert {path.name for path in launch.run.glob("saved-*")} == {f"saved-{rank}" for rank in range(4)}
        told = launch("status", launch.run)
        assert "with status 75" in told and "stopped" in told
        assert "no job" in launch("stop", launch.run)

        again = self.submit(launch)  # goes on
        assert cluster.wait_for_end(int(again), 60)["JobState"] == "COMPLETED"

    def test_stop_of_a_waiting_job_cancels_it(self, launch: Launcher, cluster: Cluster) -> None:
        number = self.submit(launch, "--sbatch=--hold")
        assert "was waiting in the queue, and is cancelled" in launch("stop", launch.run)
        assert cluster.job(int(number))["JobState"] == "CANCELLED"
        assert "CANCELLED" in launch("status", launch.run)

    def test_stop_of_a_chain_stops_what_waits_too(self, launch: Launcher, cluster: Cluster) -> None:
        first = self.submit(launch)
        second = self.submit(launch, "--dependency", f"afterany:{first}")
        wait_for(launch.run / "started-0")
        told = launch("stop", launch.run)
        assert f"job {second}: was waiting" in told and f"job {first}: will save and end" in told
        cluster.wait_for_end(int(first), 60)
        assert cluster.job(int(second))["JobState"] == "CANCELLED"

    def test_an_array(self, launch: Launcher, cluster: Cluster) -> None:
        """One task runs at a time; the one that runs saves, those that wait are cancelled."""
        launch.tree["training"]["output_dir"] = str(launch.folder / "seed-{task}")
        number = self.submit(launch, "--array", "0-2%1")
        wait_for(*(launch.folder / "seed-0" / f"started-{rank}" for rank in range(4)))
        array = launch.folder / "seed-array"
        told = launch("status", array).splitlines()
        assert told[1].startswith("task 0      RUNNING: step 3 of 12")
        assert told[2].startswith("task 1      PENDING: step none") and told[3].startswith(
            "task 2      PENDING"
        )
        assert f"job         {number}_0: RUNNING" in launch("status", launch.folder / "seed-0")

        assert f"job {number}_1: was waiting" in launch("stop", launch.folder / "seed-1")
        told = launch("stop", array)
        assert f"job {number}_0: will save and end" in told and "cancelled" in told
        deadline = time.monotonic() + 60
        while "RUNNING" in (told := launch("status", array)) or "COMPLETING" in told:
            assert time.monotonic() < deadline, told
            time.sleep(0.2)
        assert "stopped" in told.splitlines()[1]
        assert not (launch.folder / "seed-1" / "started-0").exists()
        assert not (launch.folder / "seed-2" / "started-0").exists()
        assert (launch.folder / "seed-0" / "saved-0").exists()

    @pytest.mark.slow
    def test_logs_follow_until_the_job_has_ended(self, launch: Launcher, cluster: Cluster) -> None:
        number = self.submit(launch)
        wait_for(launch.run / "started-0")
        ending = threading.Timer(2, lambda: cluster.run("scancel", "--batch", "--signal=USR1", number))
        ending.start()
        began = time.monotonic()
        told = launch(
            "logs", launch.run, "--follow"
        )  # saves, goes back into the queue, is done at its second start
        assert time.monotonic() - began < 90
        assert f"==> {launch.run}/launch/logs/{number}.out <==" in told
        assert f"start 1 of job {number}" in told and f"start 2 of job {number}" in told and "done" in told
