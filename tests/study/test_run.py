"""Cells that run here and as an array: skipped, failed, gone on with, refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.launch.options import JobOptions, array_tasks
from mf_train.study.cells import CELLS, make_grid
from mf_train.study.collect import collect
from mf_train.study.run import array_text, run_here, submit_array
from mf_train.study.state import Outcome, cell_state, write_outcome
from mf_train.study.study import load_study
from tests.study.studies import study_file, write_metrics

REPOSITORY = Path(__file__).resolve().parents[2]


def test_done_cells_are_skipped_and_failed_ones_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = load_study(study_file(tmp_path, {"seed": [0, 1, 2]}))
    grid = make_grid(study)
    (tmp_path / "text.jsonl").unlink()  # a cell that starts ends at once
    write_metrics(grid.cells[0].folder, {4: 2.0}, {4: 2.0})
    grid.cells[1].folder.mkdir(parents=True)
    write_outcome(grid.cells[1].folder, Outcome(1, "loss is nan", 1.0))
    assert run_here(study, grid) == 1
    output = capfd.readouterr().out
    assert "3 cells, 1 to run" in output
    assert "cell 1 failed at step 0: loss is nan" in output and "--retry-failed" in output
    failed = cell_state(grid.cells[2])
    assert failed.name == "failed" and "text.jsonl" in failed.reason
    assert not (grid.cells[0].folder / "output.log").exists()
    assert [path.name for path in (tmp_path / "out" / CELLS).iterdir()] == ["2.yaml"]
    assert run_here(study, grid, at_once=2, retry=True) == 1
    assert "3 cells, 2 to run" in capfd.readouterr().out
    assert "text.jsonl" in cell_state(grid.cells[1]).reason


def test_all_done_is_status_0(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, {"seed": [0]}))
    grid = make_grid(study)
    write_metrics(grid.cells[0].folder, {4: 2.0}, {4: 2.0})
    assert run_here(study, grid) == 0


def test_two_runs_of_a_study_at_once_are_refused(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, {"seed": [0]}))
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / "run.lock"
    code = (
        f"import fcntl, sys; f = open({str(lock)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(UserError, match="another `study run` works on it"):
            run_here(study, make_grid(study))
        other.communicate()


def test_no_cell_to_run_is_a_mistake(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, {"tokens": [1, 2]}))
    grid = make_grid(study)
    for call in (
        lambda: run_here(study, grid),
        lambda: submit_array(study, grid, JobOptions(tasks_per_node=1)),
    ):
        with pytest.raises(UserError, match=r"no cell is left to run; 2 .* less than one step of 256 tokens"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cell_whose_metrics_have_gone_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = load_study(study_file(tmp_path, {"seed": [0]}))
    grid = make_grid(study)
    folder = grid.cells[0].folder
    assert run_here(study, grid) == 0
    (folder / "metrics.jsonl").unlink()  # its checkpoint says that all is done
    capfd.readouterr()
    assert run_here(study, grid) == 1
    assert (
        "cell 0 has ended, and its metrics.jsonl has not its last step: delete its folder"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 9], "0,2-3,9")], ids=str
)
def test_numbers_as_sbatch_reads_them(numbers: list[int], text: str) -> None:
    assert array_text(numbers) == text and array_tasks(text) == numbers


def test_an_array_of_the_cells_that_are_not_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = load_study(study_file(tmp_path, {"bits": [2, 4], "seed": [0, 1]}))
    grid = make_grid(study)
    write_metrics(grid.cells[1].folder, {4: 2.0}, {4: 2.0})
    options = JobOptions(tasks_per_node=1, time="1:00:00")
    assert submit_array(study, grid, options, at_once=2, dry_run=True) == 0
    script = (tmp_path / "out" / "cell-array" / "launch" / "job.sbatch").read_text()
    assert "--array=0,2-3%2" in script and 'out/cell-"$SLURM_ARRAY_TASK_ID"' in script
    for cell in (grid.cells[0], grid.cells[2], grid.cells[3]):
        assert load_config(cell.folder / "launch" / "config.yaml") == cell.config
    assert not (grid.cells[1].folder / "launch").exists()


def test_an_array_of_another_size_is_refused(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, {"seed": [0]}, processes=2))
    grid = make_grid(study)
    with pytest.raises(UserError, match="processes is 2, and --nodes 1 with 1 processes each gives 1"):
        submit_array(study, grid, JobOptions(tasks_per_node=1), dry_run=True)
    with pytest.raises(UserError, match="--array and --elastic do not go with a study"):
        submit_array(study, grid, JobOptions(tasks_per_node=2, array="0-1"), dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_cells_train_and_their_table_fills(tmp_path: Path) -> None:
    study = load_study(study_file(tmp_path, {"bits": [2, 4]}))
    grid = make_grid(study)
    assert run_here(study, grid, at_once=2) == 0
    rows = collect(study, grid)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert all(0 < row["final_validation_loss"] < 20 and row["seconds"] > 0 for row in rows)


@pytest.mark.distributed
def test_a_stop_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    path = study_file(tmp_path, {"seed": [0, 1]})
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"settings": {"training.steps": 2000}}))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "mf_train", "study", "run", str(path)]
    grid = make_grid(load_study(path))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        limit = time.monotonic() + 120
        while cell_state(grid.cells[0]).step < 3:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "run the same command again" in output
    state = cell_state(grid.cells[0])
    assert state.name == "unfinished" and 3 <= state.step < 2000
    assert cell_state(grid.cells[1]).name == "missing"
    assert (grid.cells[0].folder / "checkpoints" / "latest").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_cells_that_a_killed_run_left_are_waited_for(tmp_path: Path) -> None:
    path = study_file(tmp_path, {"seed": [0, 1]}, settings={"training.steps": 60})
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "mf_train", "study", "run", str(path), "--no-report"]
    study = load_study(path)
    grid = make_grid(study)
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        limit = time.monotonic() + 120
        while cell_state(grid.cells[0]).step < 1:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.05)
        process.kill()
    assert cell_state(grid.cells[0]).name == "unfinished", "the test needs a longer cell"
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "cells that a killed one left" in refused.stderr
    while cell_state(grid.cells[0]).name != "done":
        assert time.monotonic() < limit + 120
        time.sleep(0.1)
    while True:  # until the cell has ended
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        if done.returncode != 2:
            break
        assert time.monotonic() < limit + 240
    assert done.returncode == 0 and "2 cells, 1 to run" in done.stdout, done.stdout + done.stderr
    assert [cell_state(cell).name for cell in grid.cells] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.distributed
def test_cells_of_two_processes_and_their_report(tmp_path: Path) -> None:
    path = study_file(tmp_path, {"learning_rate": [1e-3, 1e30]}, processes=2)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "mf_train", "study", "run", str(path), "--samples", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cell 0 done at step 4" in done.stdout and "cell 1 failed at step 1: step 2: " in done.stdout
    assert "2 cells: 1 done, 1 failed" in done.stdout and "nothing to fit" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "left out: cell 1 failed" in page
    assert "| 0.001 |" not in (tmp_path / "out" / "summary.md").read_text(), "one value is no comparison"
