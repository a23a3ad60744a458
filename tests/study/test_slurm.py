"""A study as an array of a real SLURM cluster: cells end, one fails, the next run skips what is done; its report."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mf_train.study.cells import Cell
from mf_train.study.collect import read_results
from mf_train.study.state import cell_state
from tests.launch.cluster import Cluster
from tests.study.studies import make_study
from tests.training.runs import REPOSITORY, environment

pytestmark = [pytest.mark.slurm, pytest.mark.slow]


def study(cluster: Cluster, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`memoryformer study` as typed on the login node, which is this machine."""
    return subprocess.run(
        [sys.executable, "-m", "mf_train", "study", *map(str, arguments)],
        env={**environment(), "SLURM_CONF": cluster.environment["SLURM_CONF"]},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )


def output(cells: tuple[Cell, ...]) -> str:
    """What the tasks wrote: for the message of a failed assertion."""
    paths = sorted(path for cell in cells for path in (cell.folder / "launch").rglob("*") if path.is_file())
    logs = [path for path in paths if path.suffix in (".log", ".out", ".tsv")]
    return "".join(f"-- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)


def test_an_array_of_cells(slurm_cluster: Cluster, tmp_path: Path) -> None:
    made, grid = make_study(tmp_path, {"learning_rate": [1e-3, 1e30, 3e-3]})  # the second diverges at once
    path, cells = made.path, grid.cells
    queue = ["--slurm", "--tasks-per-node", 1, "--at-once", 2, "--retries", 0, "--time", "0:20:00"]
    done = study(slurm_cluster, "run", path, *queue, "--parsable")
    assert done.returncode == 0, done.stderr
    job = int(done.stdout)
    script = (tmp_path / "out" / "cell-array" / "launch" / "job.sbatch").read_text()
    assert "--array=0-2%2" in script
    states = [slurm_cluster.wait_for_end(f"{job}_{cell.number}", 300)["JobState"] for cell in cells]
    assert states == ["COMPLETED", "FAILED", "COMPLETED"], output(cells)
    assert [cell_state(cell).name for cell in cells] == ["done", "failed", "done"], output(cells)
    assert "step 2: loss is nan" in cell_state(cells[1]).reason

    before = {cell.number: (cell.folder / "metrics.jsonl").stat().st_mtime_ns for cell in cells}
    again = study(slurm_cluster, "run", path, *queue)
    assert again.returncode == 0 and "nothing to run" in again.stderr and "1 failed" in again.stderr
    retry = study(slurm_cluster, "run", path, *queue, "--retry-failed", "--dry-run")
    assert retry.returncode == 0, retry.stderr
    script = (tmp_path / "out" / "cell-array" / "launch" / "job.sbatch").read_text()
    assert "--array=1%2" in script
    assert before == {cell.number: (cell.folder / "metrics.jsonl").stat().st_mtime_ns for cell in cells}

    report = study(slurm_cluster, "report", path, "--samples", 5)
    assert report.returncode == 0, report.stderr
    assert "3 cells: 2 done, 1 failed" in report.stdout and "left out: cell 1 failed" in report.stdout
    rows = read_results(tmp_path / "out" / "results.csv")
    assert rows["state"].tolist() == ["done", "failed", "done"]
    assert all(0 < float(loss) < 20 for loss in rows["final_validation_loss"][::2])
    assert "loss is nan" in (tmp_path / "out" / "report.html").read_text()


def test_cells_of_two_processes(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """A cell's processes are a task's: here two nodes with one each, beside another cell."""
    settings = {"training.global_batch_size": 16}
    made, grid = make_study(tmp_path, {"seed": [0, 1]}, processes=2, settings=settings)
    cells = grid.cells
    size = ("--nodes", 2, "--tasks-per-node", 1, "--time", "0:20:00")
    done = study(slurm_cluster, "run", made.path, "--slurm", *size, "--parsable")
    assert done.returncode == 0, done.stderr
    for cell in cells:
        slurm_cluster.wait_for_end(f"{int(done.stdout)}_{cell.number}", 300)
    assert [cell_state(cell).name for cell in cells] == ["done", "done"], output(cells)
