"""The command line of studies, in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from mf_train.study.run import write_cells
from tests.study.studies import make_study, run_study, study_file, write_metrics


def test_plan_collect_and_fit(tmp_path: Path) -> None:
    axes = {"size": {"depths": [1, 2, 3], "width": 16, "head_size": 8}, "flops": [1e10, 3e10], "bits": [4, 5]}
    study, grid = make_study(tmp_path, axes)
    plan = run_study("plan", study.path)
    assert plan.returncode == 0, plan.stderr
    assert "6 cells of 1 processes" in plan.stdout and "left out: 6" in plan.stdout
    assert "size=2 flops=1e+10 bits=5: model.bits 5 does not divide model.hidden_size 32" in plan.stdout
    write_cells(study, grid.cells)
    for index, cell in enumerate(grid.cells):
        steps = cell.config.training.steps
        loss = 5 - 0.1 * cell.number + 0.2 * (index // 2 - 1) ** 2
        write_metrics(cell.folder, {steps: loss}, {steps: loss})
    collect = run_study("collect", study.path)
    assert collect.returncode == 0 and "6 cells: 6 done" in collect.stdout
    fit = run_study("fit", study.path, "--samples", 5)
    assert fit.returncode == 0, fit.stderr
    assert "L(N, D): floor" in fit.stdout and "warning:" in fit.stdout
    assert (tmp_path / "out" / "report.html").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "none.yaml"), "none.yaml: no such"),
        (("fit",), "study collect first"),
        (("run", "--at-once", "0"), "--at-once 0"),
        (("run", "--dry-run"), "need --slurm"),
    ],
    ids=lambda value: str(value),
)
def test_mistakes_end_with_2(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    verb, *rest = arguments
    path = study_file(tmp_path, {"seed": [0]})
    done = run_study(verb, *([] if "none.yaml" in rest else [path]), *rest)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
