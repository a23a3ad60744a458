"""Tables by axis: mean and spread over the seeds, differences from an axis's first value, studies without fits."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from mf_train.study.analysis import measure
from mf_train.study.cells import make_grid
from mf_train.study.collect import collect, read_results, write_results
from mf_train.study.report import fit_study
from mf_train.study.state import Outcome, write_outcome
from mf_train.study.study import load_study
from mf_train.study.summary import AxisTable, axis_tables, deviation, markdown
from tests.study.studies import study_file, write_metrics

RATES = ["0.001", "0.003", "0.01"]


def tuning(folder: Path, losses: dict[tuple[str, str], float], kinds: tuple[str, ...] = ("dense",)) -> Path:
    """A study over learning rates and seeds with these losses by (rate, seed); its folder with results.csv."""
    axes = {"kind": list(kinds), "learning_rate": [float(rate) for rate in RATES], "seed": [0, 1, 2]}
    study = load_study(study_file(folder, axes))
    grid = make_grid(study)
    for cell in grid.cells:
        loss = losses.get((cell.values["learning_rate"], cell.values["seed"]))
        if loss is not None:
            write_metrics(cell.folder, {4: loss}, {4: loss})
        else:
            write_outcome_of_a_diverged(cell.folder)
    write_results(study, collect(study, grid))
    return study.folder


def write_outcome_of_a_diverged(folder: Path) -> None:
    write_metrics(folder, {1: 5.0}, {})
    write_outcome(folder, Outcome(1, "step 2: the loss is nan", 1.0))


def tables(folder: Path, order: dict[str, list[str]] | None = None) -> list[AxisTable]:
    return axis_tables(
        measure(read_results(folder / "results.csv"), "flops", "parameters", "model.kind"), order or {}
    )


def test_means_spread_and_paired_differences(tmp_path: Path) -> None:
    random = np.random.default_rng()
    of_seed = random.normal(5, 1, 3)  # common to all rates: pairs cancel it
    apart = {"0.001": 0.0, "0.003": -0.5, "0.01": 0.25}
    noise = random.normal(0, 0.01, (3, 3))
    losses = {
        (rate, str(seed)): of_seed[seed] + apart[rate] + noise[index, seed]
        for index, rate in enumerate(RATES)
        for seed in range(3)
    }
    (table,) = tables(tuning(tmp_path, losses))
    assert (table.axis, table.first) == ("learning_rate", "0.001")
    assert [line.value for line in table.lines] == RATES and table.lines[0].difference is None
    for index, line in enumerate(table.lines):
        own = of_seed + apart[line.value] + noise[index]
        assert line.measured.mean == pytest.approx(own.mean())
        assert deviation(line.measured.losses) == pytest.approx(own.std(ddof=1))
        if line.difference:
            pairs = own - of_seed - noise[0]
            reach = 2.919986 * pairs.std(ddof=1) / math.sqrt(3)  # Student's t, 2 degrees of freedom, 95 %
            assert line.difference.value == pytest.approx(pairs.mean())
            assert line.difference.high - line.difference.low == pytest.approx(2 * reach, rel=1e-6)


def test_the_study_s_order_says_what_is_compared_with(tmp_path: Path) -> None:
    folder = tuning(tmp_path, {(rate, seed): 3.0 for rate in RATES for seed in "012"})
    (table,) = tables(folder, {"learning_rate": ["0.01", "0.002", "0.001", "0.003"]})
    assert [line.value for line in table.lines] == ["0.01", "0.001", "0.003"] and table.first == "0.01"


def test_a_first_value_that_is_missing_is_replaced_and_said(tmp_path: Path) -> None:
    (table,) = tables(tuning(tmp_path, {("0.003", "0"): 3.0, ("0.01", "0"): 2.5}))
    assert table.first == "0.003" and table.lines[1].base == "0.003"
    first = {("dense", "0.001"), ("dense", "0.003"), ("memoryformer", "0.003"), ("memoryformer", "0.01")}
    folder = tuning(tmp_path, {(rate, "0"): 1.0 for rate in RATES}, ("dense", "memoryformer"))
    rows = [one for one in read_results(folder / "results.csv") if one["axis.seed"] == "0"]
    kept = [one for one in rows if (one["axis.kind"], one["axis.learning_rate"]) in first]
    found = axis_tables(measure(kept, "flops", "parameters", "model.kind"), {"learning_rate": RATES})
    (table,) = (one for one in found if one.axis == "learning_rate")
    assert [line.base for line in table.lines] == ["", "0.001", "", "0.003"]
    text = markdown("one", found, [])
    assert "+0.0000 (1 pair) |" in text and "+0.0000 (1 pair, from 0.003) |" in text


def test_pairs_are_counted(tmp_path: Path) -> None:
    losses = {("0.001", seed): 5.0 for seed in "012"} | {
        ("0.003", "1"): 4.0,
        ("0.003", "2"): 4.5,
        ("0.01", "0"): 1.0,
    }
    text = markdown("one", tables(tuning(tmp_path, losses)), [])
    assert re.search(r"\| 0\.003 .* 2 \| 4\.2500 .* -0\.7500 \[.*\] \(2 pairs\) \|", text)
    assert "-4.0000 (1 pair) |" in text
    apart = {("0.001", "0"): 5.0, ("0.003", "1"): 4.0}
    assert "-1.0000 (no pairs) |" in markdown("one", tables(tuning(tmp_path, apart)), [])


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    (table,) = tables(tuning(tmp_path, {("0.001", "0"): 3.0, ("0.003", "0"): 2.0}))
    apart = table.lines[1].difference
    assert apart is not None and apart.value == -1 and math.isnan(apart.low)
    text = markdown("one", [table], [])
    assert "| -1.0000 (1 pair) |" in text and "nan" not in text


def test_a_study_without_fits_has_a_report(tmp_path: Path) -> None:
    losses = {(rate, seed): 3 + float(seed) / 10 for rate in RATES[:2] for seed in "012"}
    folder = tuning(tmp_path, losses, ("dense", "memoryformer"))
    lines = list(fit_study(folder, {}, "flops", "parameters", "model.kind", samples=5))
    assert sum("nothing to fit: all configurations have one size" in line for line in lines) == 2
    assert sum("failed at step 1: step 2: the loss is nan" in line for line in lines) == 6
    text = (folder / "summary.md").read_text()
    assert "## kind, compared with dense" in text and "## learning_rate, compared with 0.001" in text
    assert text.count("3.1000 | 0.1000 | 3.0000 to 3.2000") == 8 and "cell 6 failed" in text
    page = (folder / "report.html").read_text()
    assert "losses by axis" in page and page.count("data:image/png") >= 2 and "the loss is nan" in page
    assert "+0.0000 [+0.0000, +0.0000] (3 pairs)" in page


@pytest.mark.parametrize("axes", [{}, {"bits": [4]}], ids=["seeds alone", "an axis of one value"])
def test_a_study_with_one_configuration(tmp_path: Path, axes: dict[str, list[int]]) -> None:
    study = load_study(study_file(tmp_path, axes | {"seed": [0, 1]}))
    grid = make_grid(study)
    for cell, loss in zip(grid.cells, (2.0, 3.0), strict=True):
        write_metrics(cell.folder, {4: loss}, {4: loss})
    write_results(study, collect(study, grid))
    lines = list(fit_study(study.folder, {}, "flops", "parameters", "model.kind", samples=5))
    assert any("nothing to fit" in line for line in lines)
    assert any("1 configurations, 2 runs" in line for line in lines)
    text = (study.folder / "summary.md").read_text()
    assert "## configurations" in text and "| 2 | 2.5000 | 0.7071 | 2.0000 to 3.0000 |" in text
    assert "0.7071" in (study.folder / "report.html").read_text()


def test_nothing_done_is_a_report_that_says_so(tmp_path: Path) -> None:
    folder = tuning(tmp_path, {})
    (folder / "plots").mkdir()
    (folder / "plots" / "old.png").write_bytes(b"")
    lines = list(fit_study(folder, {}, "flops", "parameters", "model.kind", samples=5))
    assert "nothing to show yet: no cell is done" in lines
    assert "no cell is done" in (folder / "report.html").read_text()
    assert not list((folder / "plots").iterdir()), "plots of an earlier fit would be of other results"


@pytest.mark.parametrize("loss", ["nan", "inf", ""])
def test_a_loss_that_is_no_number_is_left_out(tmp_path: Path, loss: str) -> None:
    folder = tuning(tmp_path, {(rate, seed): 3.25 for rate in RATES for seed in "012"})
    path = folder / "results.csv"
    path.write_text(path.read_text().replace(",3.25,", f",{loss},", 1))
    lines = list(fit_study(folder, {}, "flops", "parameters", "model.kind", samples=5))
    assert any(line.startswith("left out:") for line in lines)
    assert [len(line.measured.losses) for line in tables(folder)[0].lines] == [2, 3, 3]
