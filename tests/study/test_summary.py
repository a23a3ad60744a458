"""Tables by axis: mean and spread over the seeds, differences from an axis's first value, studies without fits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from mf_train.study.analysis import Measured, measure
from mf_train.study.collect import collect, read_results, write_results
from mf_train.study.report import fit_study
from mf_train.study.state import Outcome, write_outcome
from mf_train.study.summary import LossTable, difference, loss_tables, markdown
from tests.study.studies import finish, make_study, write_metrics

RATES = ["0.001", "0.003", "0.01"]


def tuning(folder: Path, losses: dict[tuple[str, str], float], kinds: tuple[str, ...] = ("dense",)) -> Path:
    """A study over learning rates and seeds with these losses by (rate, seed), the others diverged; its folder."""
    axes = {"kind": list(kinds), "learning_rate": [float(rate) for rate in RATES], "seed": [0, 1, 2]}
    study, grid = make_study(folder, axes)
    for cell in grid.cells:
        loss = losses.get((cell.values["learning_rate"], cell.values["seed"]))
        if loss is not None:
            finish(cell, loss)
        else:
            write_metrics(cell.folder, {1: 5.0}, {})
            write_outcome(cell.folder, Outcome(1, "step 2: the loss is nan", 1.0))
    write_results(study.folder, collect(grid))
    return study.folder


def measured(folder: Path) -> list[Measured]:
    return measure(read_results(folder / "results.csv"), "flops", "parameters", "model.kind")


def column(table: LossTable, name: str) -> list[str]:
    return [row[table.head.index(name)] for row in table.rows]


def report(folder: Path) -> list[str]:
    return list(fit_study(folder, {}, "flops", "parameters", "model.kind", samples=5))


def test_means_spread_and_paired_differences(tmp_path: Path) -> None:
    random = np.random.default_rng()
    of_seed = random.normal(5, 1, 3)  # common to all rates: pairs cancel it
    noise = random.normal(0, 0.01, (3, 3))
    own = of_seed + np.array([[0.0], [-0.5], [0.25]]) + noise  # [rate, seed]
    losses = {(rate, str(seed)): own[i, seed] for i, rate in enumerate(RATES) for seed in range(3)}
    found = measured(tuning(tmp_path, losses))
    (table,) = loss_tables(found, {})
    assert table.title == "learning_rate, compared with 0.001" and column(table, "learning_rate") == RATES
    assert column(table, "mean") == [f"{mean:.4f}" for mean in own.mean(1)]
    assert column(table, "std") == [f"{std:.4f}" for std in own.std(1, ddof=1)]
    assert column(table, "difference")[0] == ""
    for one, losses_of_rate in zip(found[1:], own[1:], strict=True):
        apart, count = difference(one, found[0])
        pairs = losses_of_rate - own[0]
        reach = 2.919986 * pairs.std(ddof=1) / math.sqrt(3)  # Student's t, 2 degrees of freedom, 95 %
        assert count == 3 and apart.value == pytest.approx(pairs.mean())
        assert apart.high - apart.low == pytest.approx(2 * reach, rel=1e-6)


def test_the_study_s_order_says_what_is_compared_with(tmp_path: Path) -> None:
    folder = tuning(tmp_path, {(rate, seed): 3.0 for rate in RATES for seed in "012"})
    (table,) = loss_tables(measured(folder), {"learning_rate": ["0.01", "0.002", "0.001", "0.003"]})
    assert column(table, "learning_rate") == ["0.01", "0.001", "0.003"]
    assert table.title == "learning_rate, compared with 0.01"


def test_a_first_value_that_is_missing_is_replaced_and_said(tmp_path: Path) -> None:
    (table,) = loss_tables(measured(tuning(tmp_path, {("0.003", "0"): 3.0, ("0.01", "0"): 2.5})), {})
    assert table.title.endswith("compared with 0.003") and column(table, "difference") == [
        "",
        "-0.5000 (1 pair)",
    ]
    folder = tuning(tmp_path, {(rate, "0"): 1.0 for rate in RATES}, ("dense", "memoryformer"))
    kept = [("dense", "0.001"), ("dense", "0.003"), ("memoryformer", "0.003"), ("memoryformer", "0.01")]
    found = [one for one in measured(folder) if (one.axes["kind"], one.axes["learning_rate"]) in kept]
    _, table = loss_tables(found, {"learning_rate": RATES})
    texts = ["", "+0.0000 (1 pair)", "", "+0.0000 (1 pair, from 0.003)"]
    assert column(table, "difference") == texts
    assert "+0.0000 (1 pair, from 0.003) |" in markdown("one", [table], [])


def test_pairs_are_counted(tmp_path: Path) -> None:
    losses = {("0.001", seed): 5.0 for seed in "012"}
    losses |= {("0.003", "1"): 4.0, ("0.003", "2"): 4.5, ("0.01", "0"): 1.0}
    text = markdown("one", loss_tables(measured(tuning(tmp_path, losses)), {}), [])
    assert re.search(r"\| 0\.003 .* 2 \| 4\.2500 .* -0\.7500 \[.*\] \(2 pairs\) \|", text)
    assert "| -4.0000 (1 pair) |" in text and "nan" not in text  # one pair has no interval
    apart = tuning(tmp_path, {("0.001", "0"): 5.0, ("0.003", "1"): 4.0})
    assert "-1.0000 (no pairs) |" in markdown("one", loss_tables(measured(apart), {}), [])


def test_a_study_without_fits_has_a_report(tmp_path: Path) -> None:
    losses = {(rate, seed): 3 + float(seed) / 10 for rate in RATES[:2] for seed in "012"}
    folder = tuning(tmp_path, losses, ("dense", "memoryformer"))
    lines = report(folder)
    assert sum("nothing to fit: all configurations have one size" in line for line in lines) == 2
    assert sum("failed at step 1: step 2: the loss is nan" in line for line in lines) == 6
    text = (folder / "summary.md").read_text()
    assert "## kind, compared with dense" in text and "## learning_rate, compared with 0.001" in text
    assert text.count("3.1000 | 0.1000 | 3.0000 to 3.2000") == 8 and "cell 6 failed" in text
    page = (folder / "report.html").read_text()
    assert "Losses by axis" in page and page.count("data:image/png") >= 2 and "the loss is nan" in page
    assert "+0.0000 [+0.0000, +0.0000] (3 pairs)" in page


@pytest.mark.parametrize("axes", [{}, {"bits": [4]}], ids=["seeds alone", "an axis of one value"])
def test_a_study_with_one_configuration(tmp_path: Path, axes: dict[str, list[int]]) -> None:
    study, grid = make_study(tmp_path, axes | {"seed": [0, 1, 2, 3]})
    for cell, loss in zip(grid.cells, (2.0, 3.0), strict=False):
        finish(cell, loss)
    write_metrics(grid.cells[2].folder, {1: 5.0}, {})
    write_results(study.folder, collect(grid))
    lines = report(study.folder)
    assert any("nothing to fit" in line for line in lines)
    assert "left out: 2 cells that are not done; run memoryformer study run" in lines
    assert any("1 configurations, 2 runs" in line for line in lines)
    text = (study.folder / "summary.md").read_text()
    assert "## configurations" in text and "| 2 | 2.5000 | 0.7071 | 2.0000 to 3.0000 |" in text
    assert "0.7071" in (study.folder / "report.html").read_text()


def test_nothing_done_is_a_report_that_says_so(tmp_path: Path) -> None:
    folder = tuning(tmp_path, {})
    (folder / "plots").mkdir()
    (folder / "plots" / "old.png").write_bytes(b"")
    lines = report(folder)
    assert "nothing to show yet: no cell is done" in lines
    assert "no cell is done" in (folder / "report.html").read_text()
    assert not list((folder / "plots").iterdir()), "plots of an earlier fit would be of other results"


@pytest.mark.parametrize("loss", ["nan", "inf", ""])
def test_a_loss_that_is_no_number_is_left_out(tmp_path: Path, loss: str) -> None:
    folder = tuning(tmp_path, {(rate, seed): 3.25 for rate in RATES for seed in "012"})
    path = folder / "results.csv"
    path.write_text(path.read_text().replace(",3.25,", f",{loss},", 1))
    lines = report(folder)
    assert any(line.startswith("left out:") for line in lines)
    assert [len(one.losses) for one in measured(folder)] == [2, 3, 3]
