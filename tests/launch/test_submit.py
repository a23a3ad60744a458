"""`memoryformer launch`: what it refuses, what it leaves, and what SLURM gets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.checkpoint.layout import step_name
from mf_train.config import ModelConfig
from mf_train.config.loading import load_config
from tests.launch.cluster import Cluster
from tests.launch.launching import SIZE, Launcher, on_cluster, stand_in, without_slurm
from tests.standalone.checkpoints import random_weights, write_checkpoint

# Notes the configuration and the code of its task, and ends.
RECORDER = """
note = {"arguments": sys.argv[1:], "code": os.environ["PYTHONPATH"].split(":")[0], "cwd": os.getcwd()}
path = Path(sys.argv[-1]).parent / f"seen-{process.rank}.json"
path.with_suffix(".partial").write_text(json.dumps(note))
path.with_suffix(".partial").rename(path)
"""
SLEEPER = "time.sleep(300)"


@pytest.fixture
def launch(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Launcher:
    monkeypatch.chdir(tmp_path)
    return Launcher(tmp_path, capsys)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text())
    return tree


class TestWithoutSlurm:
    @pytest.fixture(autouse=True)
    def no_slurm(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        without_slurm(tmp_path, monkeypatch)

    def test_a_dry_run_writes_all_but_a_job(self, launch: Launcher) -> None:
        told = launch(launch.config, "training.steps=7", *SIZE, "--dry-run")
        folder = launch.run / "launch"
        assert str(folder / "job.sbatch") in told and f"sbatch {folder / 'job.sbatch'}" in told
        assert {path.name for path in folder.iterdir()} - {"code.patch"} == {
            "code",
            "config.yaml",
            "job.sbatch",
            "logs",
            "version.json",
        }
        assert load_config(folder / "config.yaml").training.steps == 7
        assert not [path.name for path in launch.run.iterdir() if path.name != "launch"]
        subprocess.run(["bash", "-n", str(folder / "job.sbatch")], timeout=30, check=True)

    def test_a_second_dry_run_replaces_the_first(self, launch: Launcher) -> None:
        launch(launch.config, *SIZE, "--dry-run")
        (launch.run / "launch" / "code" / "old").touch()
        launch(launch.config, "training.steps=9", *SIZE, "--dry-run")
        folder = launch.run / "launch"
        assert load_config(folder / "config.yaml").training.steps == 9
        assert not (folder / "code" / "old").exists()
        assert not [name for name in contents(folder) if ".new-" in name or ".before-" in name]

    def test_a_submission_says_that_slurm_is_missing(self, launch: Launcher) -> None:
        line = launch.refused(*SIZE)
        assert "sbatch: not found" in line and "--dry-run" in line

    def test_a_failed_submission_leaves_an_earlier_launch_as_it_was(self, launch: Launcher) -> None:
        launch(launch.config, *SIZE, "--dry-run")
        before = contents(launch.run)
        launch.refused("training.steps=9", *SIZE)
        assert contents(launch.run) == before

    @pytest.mark.parametrize(
        ("sbatch", "expected"),
        [
            ("echo 'Welcome to the cluster'; echo 17", None),  # some sites wrap sbatch
            ("echo '17;cluster'", None),
            ("echo 'all is well'", "sbatch said no job's number, but 'all is well'"),
            ("echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1", "Socket timed out"),
        ],
    )
    def test_what_sbatch_may_have_taken_is_kept(
        self, launch: Launcher, sbatch: str, expected: str | None
    ) -> None:
        program = launch.folder / "programs" / "sbatch"
        program.write_text(f"#!{shutil.which('bash')}\n{sbatch}\n")
        program.chmod(0o755)
        told = launch(launch.config, *SIZE, "--parsable", expect=1 if expected else 0)
        if expected is None:
            assert told.strip() == "17" and "job.json" in contents(launch.run / "launch")
        else:
            assert expected in launch.errors and "look at squeue --me" in launch.errors
        assert {"job.sbatch", "config.yaml"} <= set(contents(launch.run / "launch"))
        assert (launch.run / "launch" / "logs").is_dir()  # for the job's output

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["training.stpes=3"], "unknown key 'training.stpes'"),
            (
                ["training.global_batch_size=3"],
                "2 nodes x 2 tasks: training.global_batch_size 3 leaves some of 4 data-parallel ranks without",
            ),
            (["parallel.tensor=4"], "parallel.tensor 4 does not divide the 2 processes of a node"),
            (["tokenizer.path=nowhere"], "tokenizer.path: nowhere does not exist"),
            (["data.train=[{path: none-*.jsonl}]"], "data.train[0].path: no file matches none-*.jsonl"),
            (["data.validation=[{path: none.jsonl}]"], "data.validation[0].path: none.jsonl does not exist"),
            (["checkpoint.resume=nowhere"], "nowhere: no such checkpoint"),
            (["checkpoint.resume=never"], "checkpoint.resume is never"),
            (["training.output_dir=text.jsonl"], "text.jsonl: is a file"),
            (["training.output_dir=text.jsonl/run"], "is a file; choose another training.output_dir"),
            (["training.output_dir=a:b"], "must have no ':' in its name"),
            (["training.output_dir=runs/{task}"], "without --array it must not"),
            (["--time", "soon"], "--time soon"),
            (["--elastic", "2-4"], "--elastic 2-4: write MIN:MAX"),
            (["--array", "0-2"], "with --array it must contain {task}"),
            (["--array", "x", "training.output_dir=runs/{task}"], "--array x"),
            (["--gpus-per-node", "2"], "not both"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_refused_before_anything_is_written(
        self, launch: Launcher, arguments: list[str], expected: str
    ) -> None:
        assert expected in launch.refused(*SIZE, *arguments, "--dry-run")

    def test_a_missing_configuration(self, launch: Launcher) -> None:
        launch("none.yaml", *SIZE, expect=2)
        assert "none.yaml: no such configuration file" in launch.errors

    def test_a_folder_of_another_models_run(self, launch: Launcher) -> None:
        launch.run.mkdir()
        (launch.run / "config.yaml").write_text(yaml.safe_dump(launch.tree))
        line = launch.refused("model.num_layers=3", *SIZE, "--dry-run")
        assert "model.num_layers is 2 there and 3 here" in line

    def test_a_rate_that_would_jump_where_the_run_goes_on(self, launch: Launcher) -> None:
        model = ModelConfig(**launch.tree["model"])
        write_checkpoint(launch.run / "checkpoints" / step_name(7), model, random_weights(model, 0), 1)
        line = launch.refused(*SIZE, "--dry-run")
        assert "schedule.on_change" in line and "step 8" in line
        launch(launch.config, "schedule.on_change=rewarm", *SIZE, "--dry-run")

    def test_what_a_job_before_makes_may_be_missing(self, launch: Launcher) -> None:
        words = ["tokenizer.path=later", "checkpoint.resume=other/run", "--dependency", "afterok:5"]
        launch(launch.config, *SIZE, *words, "--dry-run")
        assert "later does not exist" in launch.errors and "other/run: no such checkpoint" in launch.errors
        script = (launch.run / "launch" / "job.sbatch").read_text()
        assert "--dependency=afterok:5\n#SBATCH --kill-on-invalid-dep=yes" in script

    def test_warnings_are_told(self, launch: Launcher) -> None:
        launch(launch.config, "checkpoint.interval=0", *SIZE, "--dry-run")
        assert launch.errors.startswith("memoryformer: warning: checkpoint.interval is 0")

    def test_an_elastic_job_tells_what_it_leaves_out(self, launch: Launcher) -> None:
        words = ["training.global_batch_size=2", "--tasks-per-node", "1", "--elastic", "1:4", "--time", "9"]
        launch(launch.config, *words, "--dry-run")
        assert "the degrees allow 1, 2 nodes: 3, 4 are not used" in launch.errors
        assert "node_counts='1 2'" in (launch.run / "launch" / "job.sbatch").read_text()

    def test_an_array_has_a_folder_for_each_task_and_one_for_all(self, launch: Launcher) -> None:
        launch.tree["training"]["output_dir"] = "runs/seed-{task}"
        launch(
            launch.config, "training.seed={task}", "data.seed=1{task}", *SIZE, "--array", "0-2", "--dry-run"
        )
        for task in range(3):
            folder = launch.folder / "runs" / f"seed-{task}" / "launch"
            assert [path.name for path in folder.iterdir()] == ["config.yaml"]
            config = load_config(folder / "config.yaml")
            assert (config.training.seed, config.data.seed) == (task, 10 + task)
            assert config.training.output_dir == f"runs/seed-{task}"
        common = launch.folder / "runs" / "seed-array" / "launch"
        assert (common / "code" / "mf_train" / "cli.py").is_file() and not (common / "config.yaml").exists()
        script = (common / "job.sbatch").read_text()
        assert f'run={launch.folder}/runs/seed-"$SLURM_ARRAY_TASK_ID"' in script

    def test_the_tasks_folder_may_come_from_an_override(self, launch: Launcher) -> None:
        launch(launch.config, "training.output_dir=a{task}/b{task}", *SIZE, "--array", "4", "--dry-run")
        assert (launch.folder / "a4" / "b4" / "launch" / "config.yaml").is_file()
        assert (launch.folder / "aarray" / "barray" / "launch" / "job.sbatch").is_file()

    def test_tasks_whose_folders_follow_other_patterns_are_refused(self, launch: Launcher) -> None:
        for task, name in enumerate(("tiny", "small")):
            launch.tree["training"]["output_dir"] = f"runs/{name}-{{task}}"
            (launch.folder / f"exp-{task}.yaml").write_text(yaml.safe_dump(launch.tree))
        launch("exp-{task}.yaml", *SIZE, "--array", "0-1", "--dry-run", expect=2)
        assert (
            "runs/small-{task} for task 1" in launch.errors and "runs/tiny-{task} for those" in launch.errors
        )

    def test_a_task_whose_sizes_cannot_work_refuses_all(self, launch: Launcher) -> None:
        words = ["training.output_dir=a{task}", "training.global_batch_size={task}", "--array", "3-6"]
        assert "training.global_batch_size 3" in launch.refused(*SIZE, *words, "--dry-run")


@pytest.mark.slurm
class TestOnACluster:
    @pytest.fixture(autouse=True)
    def cluster(self, slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
        on_cluster(slurm_cluster, monkeypatch)
        return slurm_cluster

    @pytest.mark.parametrize("folder", ["run", "it's a $(run) #1 100%"])
    def test_a_job_runs_what_was_submitted(self, launch: Launcher, cluster: Cluster, folder: str) -> None:
        run = launch.folder / folder
        python = stand_in(launch.folder, RECORDER)
        words = [f"training.output_dir='{folder.replace(chr(39), chr(39) * 2)}'", *SIZE, "--starter", "srun"]
        told = launch(launch.config, *words, "--python", python)
        record = read_json(run / "launch" / "job.json")
        number = int(record["job"])
        assert f"job        {number}: 2 nodes x 2 tasks" in told
        assert record["options"]["time"] == "10" and record["notice_seconds"] == 120
        assert cluster.wait_for_end(number, 60)["JobState"] == "COMPLETED"
        assert (run / "launch" / "logs" / f"{number}.out").is_file()
        for rank in range(4):
            seen = read_json(run / "launch" / f"seen-{rank}.json")
            assert seen["arguments"][-2:] == ["train", f"{run}/launch/config.yaml"]
            assert seen["code"] == f"{run}/launch/code" and seen["cwd"] == str(launch.folder)

    def test_a_wrong_partition_names_those_there_are(self, launch: Launcher) -> None:
        line = launch.refused(*SIZE, "--partition", "nowhere")
        assert re.search("the partitions there are: .*main.*gpu", line)

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["--partition", "nowhere"], "invalid partition specified: nowhere"),
            (
                ["--partition", "nowhere", "--array", "0-2", "training.output_dir=a/{task}"],
                "invalid partition",
            ),
            (["--partition", "gpu", "--nodes", "4"], "--nodes 4: partition gpu has 2 nodes"),
            (["--sbatch=--mem=1T"], "sbatch refused the job: Memory specification can not be satisfied"),
            (["--sbatch=--no-such-option"], "sbatch refused the job: unrecognized option '--no-such-option'"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_what_the_cluster_would_not_take(
        self, launch: Launcher, arguments: list[str], expected: str
    ) -> None:
        assert expected in launch.refused(*SIZE, *arguments)

    def test_nodes_too_small_for_the_model(self, launch: Launcher) -> None:
        line = launch.refused(*SIZE, "model.hidden_size=8192", "model.num_layers=400")
        assert "does not fit" in line and "a node of the partition has" in line

    def test_a_run_in_the_queue_is_not_launched_again(self, launch: Launcher, cluster: Cluster) -> None:
        python = stand_in(launch.folder, SLEEPER)
        number = launch.submit(*SIZE, "--python", python, "--sbatch=--hold")
        for more in (["--parsable"], ["--dry-run"], ["--dependency", "afterok:1"]):
            line = launch.refused(*SIZE, "--python", python, *more)
            assert f"job {number} of this run is still in the queue" in line and f"afterany:{number}" in line
        cluster.run("scancel", number)

    def test_a_chain_on_one_run_shares_its_snapshot(self, launch: Launcher, cluster: Cluster) -> None:
        python = stand_in(launch.folder, RECORDER)
        words = [*SIZE, "--python", python, "--starter", "srun"]
        first = launch.submit(*words, "--sbatch=--hold")
        before = (launch.run / "launch" / "version.json").read_bytes()
        line = launch.refused(*words, "--dependency", f"afterok:{first}", "training.steps=9")
        assert "trains another configuration" in line
        second = launch.submit(*words, "--dependency", f"afterok:{first}")
        assert (launch.run / "launch" / "version.json").read_bytes() == before
        record = read_json(launch.run / "launch" / "job.json")
        assert (record["job"], record["before"]) == (second, [first])
        assert cluster.job(int(second))["Reason"] == "Dependency"
        assert f"job {second} of this run is still in" in launch.refused(
            *words, "--dependency", f"afterok:{first}"
        )
        third = launch.submit(*words, "--dependency", f"afterok:{second}")
        record = read_json(launch.run / "launch" / "job.json")
        assert (record["job"], record["before"]) == (third, [first, second])
        cluster.run("scontrol", "release", first)
        assert cluster.wait_for_end(int(third), 60)["JobState"] == "COMPLETED"
        again = launch.submit(*words)  # they have ended: a new one may come
        assert read_json(launch.run / "launch" / "job.json")["before"] == []
        assert cluster.wait_for_end(int(again), 60)["JobState"] == "COMPLETED"

    def test_an_array_of_three(self, launch: Launcher, cluster: Cluster) -> None:
        launch.tree["training"]["output_dir"] = "seed-{task}"
        python = stand_in(launch.folder, RECORDER)
        words = [
            "training.seed={task}",
            "--nodes",
            "1",
            "--tasks-per-node",
            "2",
            "--time",
            "9",
            "--array",
            "0-2",
        ]
        number = launch.submit(*words, "--starter", "srun", "--python", python)
        common = launch.folder / "seed-array" / "launch"
        assert list(read_json(common / "job.json")["runs"]) == ["0", "1", "2"]
        deadline = time.monotonic() + 60
        folders = [launch.folder / f"seed-{task}" / "launch" for task in range(3)]
        while not all((folder / "seen-1.json").exists() for folder in folders):
            assert time.monotonic() < deadline, cluster.run("squeue", "-a")
            time.sleep(0.2)
        for task, folder in enumerate(folders):
            assert read_json(folder / "job.json")["job"] == f"{number}_{task}"
            assert read_json(folder / "seen-1.json")["arguments"][-1] == str(folder / "config.yaml")
            assert (common / "logs" / f"{number}_{task}.out").is_file()
