"""The table of results, from run folders in every state."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mf_train.errors import UserError
from mf_train.study.collect import collect, read_results, write_results
from mf_train.study.state import Outcome, cell_state, write_outcome
from tests.study.studies import make_study, write_metrics


def test_rows_of_every_state(tmp_path: Path) -> None:
    _, grid = make_study(tmp_path, {"seed": [0, 1, 2, 3, 4]})
    done, failed, stopped, torn, missing = grid.cells
    write_metrics(done.folder, {1: 5.0, 2: 4.0, 3: 3.0, 4: 2.0}, {2: 2.5, 4: 2.75})
    write_metrics(failed.folder, {1: 5.0, 2: 9.0}, {2: 7.0})
    write_outcome(failed.folder, Outcome(1, "loss is nan", 2.0))
    write_metrics(stopped.folder, {1: 5.0}, {})
    write_outcome(stopped.folder, Outcome(75, "stopped", 2.0))
    write_metrics(torn.folder, {1: 5.0, 2: 4.0, 3: 3.5}, {2: 6.0})
    with (torn.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    rows = collect(grid).to_dict("records")
    assert [row["state"] for row in rows] == ["done", "failed", "unfinished", "unfinished", "missing"]
    assert [row["step"] for row in rows] == [4, 2, 1, 3, 0]
    assert rows[0]["final_validation_loss"] == 2.75
    assert (rows[0]["best_validation_loss"], rows[0]["best_step"]) == (2.5, 2)
    assert rows[0]["train_loss"] == 3.5 and rows[0]["seconds"] == 2.0 and rows[0]["tokens_per_second"] == 512
    assert rows[0]["tokens"] == 4 * 256 and rows[0]["table_parameters"] > 0
    assert rows[1]["reason"] == "loss is nan"
    assert rows[3]["final_validation_loss"] is None and rows[3]["best_validation_loss"] == 6.0
    assert rows[4]["seconds"] is None and missing.number == 4


def test_the_file_gives_the_rows_back(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"seed": [0], "bits": [2, 4, 8]})
    for cell, loss in zip(grid.cells, (2.25, math.nan), strict=False):
        write_metrics(cell.folder, {4: 2.0}, {4: loss})
    rows = read_results(write_results(study.folder, collect(grid))).to_dict("records")
    assert [row["axis.bits"] for row in rows] == [row["model.bits"] for row in rows] == ["2", "4", "8"]
    assert [row["final_validation_loss"] for row in rows] == ["2.25", "nan", ""]
    assert [row["best_step"] for row in rows] == ["4", "4", ""]
    assert rows[0]["optimizer.betas"] == "[0.9, 0.95]" and rows[0]["state"] == "done"


def test_a_failed_slurm_start_is_a_failed_cell(tmp_path: Path) -> None:
    _, grid = make_study(tmp_path, {"seed": [0, 1, 2]})
    endings = [("1", "ends"), ("143", "requeue"), ("", "")]
    for cell, (status, following) in zip(grid.cells, endings, strict=True):
        (cell.folder / "launch").mkdir(parents=True)
        start = f"2026-01-01T00:00:00\t7_{cell.number}\t1\tstarted\tn1\t1\tnone\t\t\n"
        end = f"2026-01-01T00:01:00\t7_{cell.number}\t1\tended\tn1\t1\tnone\t{status}\t{following}\n"
        (cell.folder / "launch" / "starts.tsv").write_text(start + (end if status else ""))
    assert [cell_state(cell).name for cell in grid.cells] == ["failed", "unfinished", "unfinished"]
    assert "job 7_0 ended with 1" in cell_state(grid.cells[0]).reason


def test_the_newest_end_decides_here_or_under_slurm(tmp_path: Path) -> None:
    _, grid = make_study(tmp_path, {"seed": [0, 1, 2, 3]})
    lines = {
        following: "".join(
            f"{when}\t7\t1\t{event}\tn1\t1\tnone\t{end}\n"
            for when, event, end in (
                ("2026-01-01T00:00:00+0000", "started", "\t"),
                (f"{year}-01-01T00:01:00+0000", "ended", f"1\t{following}"),
            )
        )
        for following, year in (("ends", 2026), ("stopped", 2026), ("requeue", 2999))
    }
    failed, stopped = Outcome(2, "tokenizer.path: x does not exist", 1.0), Outcome(75, "stopped", 1.0)
    for cell, (following, outcome) in zip(
        grid.cells,
        [("stopped", failed), ("ends", stopped), ("requeue", failed), ("ends", failed)],
        strict=True,
    ):
        (cell.folder / "launch").mkdir(parents=True)
        (cell.folder / "launch" / "starts.tsv").write_text(lines[following])
        write_outcome(cell.folder, outcome)
    states = [cell_state(cell) for cell in grid.cells]
    assert [state.name for state in states] == ["failed", "unfinished", "unfinished", "failed"]
    assert states[0].reason == states[3].reason == "tokenizer.path: x does not exist"


def test_a_table_that_is_not_there_or_old_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="study collect first"):
        read_results(tmp_path / "results.csv")
    for text, words in (
        ("cell,state\n0,done\n", "no column reason"),
        ("", "is no table"),
        ("a\n1,2\n3,4,5\n", "is no table"),
    ):
        (tmp_path / "results.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            read_results(tmp_path / "results.csv")


def test_what_is_no_number_in_a_done_row_is_said(tmp_path: Path) -> None:
    study, grid = make_study(tmp_path, {"seed": [0, 1]})
    write_metrics(grid.cells[0].folder, {4: 2.0}, {4: 2.25})
    rows = collect(grid)
    for name, value in (
        ("final_validation_loss", "n/a"),
        ("flops", ""),
        ("tokens", "1,000"),
        ("table_parameters", "nan"),
        ("bytes_moved", "inf"),
    ):
        edited = rows.copy()
        edited.loc[0, name] = value
        path = write_results(study.folder, edited)
        message = (
            f"{path}: cell 0: {name} is '{value}', which is no number; memoryformer study collect writes"
        )
        with pytest.raises(UserError, match=message):
            read_results(path)
        edited.loc[0, "state"] = "failed"  # no later step reads the numbers of such a cell
        assert len(read_results(write_results(study.folder, edited))) == 2


def test_a_damaged_outcome_is_said(tmp_path: Path) -> None:
    (cell,) = make_study(tmp_path, {"seed": [0]})[1].cells
    cell.folder.mkdir(parents=True)
    (cell.folder / "outcome.json").write_text("{")
    with pytest.raises(UserError, match=r"outcome.json: is damaged"):
        cell_state(cell)
