"""Cells that run here and as an array: skipped, failed, gone on with, refused."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.launch.options import JobOptions, array_tasks
from mf_train.study.cells import CELLS
from mf_train.study.collect import collect
from mf_train.study.run import array_text, run_here, submit_array
from mf_train.study.state import Outcome, cell_state, write_outcome
from tests.study.studies import finish, make_study, run_study
from tests.training.runs import REPOSITORY, command_line, environment


def start_study(*arguments: object) -> subprocess.Popen[str]:
    """`memoryformer study ARGUMENTS`, which runs on."""
    command = command_line(["study", *map(str, arguments)])
    return subprocess.Popen(command, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_done_cells_are_skipped_and_failed_ones_listed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study, grid = make_study(tmp_path, {"seed": [0, 1, 2]})
    (tmp_path / "text.jsonl").unlink()  # a cell that starts ends at once
    finish(grid.cells[0], 2.0)
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
    study, grid = make_study(tmp_path, {"seed": [0]})
    finish(grid.cells[0], 2.0)
    assert run_here(study, grid) == 0


def test_two_runs_of_a_study_at_once_are_refused(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"seed": [0]})
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "run.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another `study run` works on it"):
            run_here(study, grid)


def test_no_cell_to_run_is_a_mistake(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"tokens": [1, 2]})
    for call in (
        lambda: run_here(study, grid),
        lambda: submit_array(study, grid, JobOptions(tasks_per_node=1)),
    ):
        with pytest.raises(UserError, match=r"no cell is left to run; 2 .* less than one step of 256 tokens"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_cell_whose_metrics_have_gone_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study, grid = make_study(tmp_path, {"seed": [0]})
    folder = grid.cells[0].folder
    assert run_here(study, grid) == 0
    (folder / "metrics.jsonl").unlink()  # its checkpoint says that all is done
    capfd.readouterr()
    assert run_here(study, grid) == 1
    words = "cell 0 has ended, but its metrics.jsonl lacks the last step; delete its folder"
    assert words in capfd.readouterr().out


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 9], "0,2-3,9")], ids=str
)
def test_numbers_as_sbatch_reads_them(numbers: list[int], text: str) -> None:
    assert array_text(numbers) == text and array_tasks(text) == numbers


def test_an_array_of_the_cells_that_are_not_done(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study, grid = make_study(tmp_path, {"bits": [2, 4], "seed": [0, 1]})
    finish(grid.cells[1], 2.0)
    options = JobOptions(tasks_per_node=1, time="1:00:00")
    assert submit_array(study, grid, options, at_once=2, dry_run=True) == 0
    script = (tmp_path / "out" / "cell-array" / "launch" / "job.sbatch").read_text()
    assert "--array=0,2-3%2" in script and 'out/cell-"$SLURM_ARRAY_TASK_ID"' in script
    for cell in (grid.cells[0], grid.cells[2], grid.cells[3]):
        assert load_config(cell.folder / "launch" / "config.yaml") == cell.config
    assert not (grid.cells[1].folder / "launch").exists()


def test_an_array_of_another_size_is_refused(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"seed": [0]}, processes=2)
    with pytest.raises(UserError, match="processes is 2, and --nodes 1 with 1 processes each gives 1"):
        submit_array(study, grid, JobOptions(tasks_per_node=1), dry_run=True)
    with pytest.raises(UserError, match="--array and --elastic do not go with a study"):
        submit_array(study, grid, JobOptions(tasks_per_node=2, array="0-1"), dry_run=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_cells_train_and_their_table_fills(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"bits": [2, 4]})
    assert run_here(study, grid, at_once=2) == 0
    rows = collect(grid).to_dict("records")
    assert [row["state"] for row in rows] == ["done", "done"]
    assert all(0 < row["final_validation_loss"] < 20 and row["seconds"] > 0 for row in rows)


@pytest.mark.distributed
def test_a_stop_saves_and_the_next_run_goes_on(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"seed": [0, 1]}, settings={"training.steps": 2000})
    with start_study("run", study.path) as process:
        wait_until(lambda: process.poll() is not None or cell_state(grid.cells[0]).step >= 3)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "run the same command again" in output
    state = cell_state(grid.cells[0])
    assert state.name == "unfinished" and 3 <= state.step < 2000
    assert cell_state(grid.cells[1]).name == "missing"
    assert (grid.cells[0].folder / "checkpoints" / "latest").exists()


@pytest.mark.distributed
def test_a_cell_that_stopped_by_itself_goes_on_with_the_same_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a job whose time is nearly over cells save and stop, and nothing of them may be deleted."""
    study, grid = make_study(tmp_path, {"seed": [0]})
    with monkeypatch.context() as in_a_job:
        in_a_job.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
        assert run_here(study, grid) == 75
    told = capfd.readouterr().out
    assert (
        "cell 0 was stopped at step 0; run the same command again to go on" in told and "delete" not in told
    )
    assert run_here(study, grid) == 0 and cell_state(grid.cells[0]).name == "done"


@pytest.mark.slow
@pytest.mark.distributed
def test_cells_that_a_killed_run_left_are_waited_for(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"seed": [0, 1]}, settings={"training.steps": 60})
    run = ("run", study.path, "--no-report")
    with start_study(*run) as process:
        wait_until(lambda: process.poll() is not None or cell_state(grid.cells[0]).step >= 1)
        process.kill()
        assert cell_state(grid.cells[0]).name == "unfinished", "the test needs a longer cell"
        refused = run_study(*run)
    assert refused.returncode == 2 and "cells that a killed one left" in refused.stderr
    wait_until(lambda: cell_state(grid.cells[0]).name == "done", 240)
    done = run_study(*run)
    limit = time.monotonic() + 120
    while done.returncode == 2 and time.monotonic() < limit:  # until the cell has ended
        done = run_study(*run)
    assert done.returncode == 0 and "2 cells, 1 to run" in done.stdout, done.stdout + done.stderr
    assert [cell_state(cell).name for cell in grid.cells] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.distributed
def test_cells_of_two_processes_and_their_report(tmp_path: Path) -> None:
    study, _ = make_study(tmp_path, {"learning_rate": [1e-3, 1e30]}, processes=2)
    done = run_study("run", study.path, "--samples", 5)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "cell 0 done at step 4" in done.stdout and "cell 1 failed at step 1: step 2: " in done.stdout
    assert "2 cells: 1 done, 1 failed" in done.stdout and "nothing to fit" in done.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert "left out: cell 1 failed" in page
    assert "| 0.001 |" not in (tmp_path / "out" / "summary.md").read_text(), "one value is no comparison"
