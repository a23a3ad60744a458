"""The page of a run: curves that are single, what happened, and nothing that is fetched from elsewhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markupsafe import escape

from mf_train.cli import main
from mf_train.reporting.history import Curve, read_history
from mf_train.reporting.panels import PANELS, draw, thin
from mf_train.reporting.report import facts, report


def record(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 512 * step,
        "loss": loss,
        "grad_norm": 2 + math.sin(step / 50),
        "learning_rate": 1e-3 * min(1, step / 500),
        "batch_digest": "00ff",
        "epochs": [0.1],
        "data_wait_seconds": 0.01,
        "step_seconds": 0.5,
        "tokens_per_second": 1024.0,
        "flops_share": None,
        "peak_memory_bytes": 3_000_000_000 + step,
    } | more


def write_run(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {bits: 4}  # <b>&")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return folder


def eventful(steps: int) -> list[dict[str, Any]]:
    """A run that went back to an earlier step once, with everything that a record may hold."""

    def one(step: int, base: float) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if step % 100 == 0:
            more["validation_loss"] = base + 0.1
            more["validation"] = {name: {"loss": base, "perplexity": 9.0} for name in ("books", "code")}
            more |= {"rank_seconds_least": 0.4, "rank_seconds_median": 0.41, "rank_seconds_most": 0.6}
            hashes = [f"blocks.{layer}.{name}" for layer in range(12) for name in ("hash_ffn", "hash_inner")]
            health = {"rows_read": 0.5, "entropy": 0.3, "largest_share": 0.1}
            more["tables"] = {
                name: {key: value * (1 + at / 30) for key, value in health.items()}
                | {"bit_imbalances": [0.1]}
                for at, name in enumerate(hashes)
            }
        if step == 300:
            more["alarms"] = [{"hash": "blocks.3.hash_ffn", "tables": [2, 6], "because": ["entropy"]}]
        return record(step, base, **more)

    half = steps // 2
    first = [one(step, 9 - step / steps) for step in range(1, half + 51)]
    again = [one(step, 5 - step / steps) for step in range(half + 1, steps + 1)]
    again[0]["resumed_after"] = half
    again[7] |= {"loss": None, "grad_norm": None, "skipped": "its loss is nan", "skipped_steps": 1}
    return first + again


def test_curves_are_those_of_the_last_training(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", eventful(1000))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1001, "lo')  # a line that is being written
    history = read_history(run)
    loss = history.curves["loss"]
    assert list(loss.steps) == [step for step in range(1, 1001) if step != 508]
    np.testing.assert_array_equal(loss.values[:500], 9 - np.arange(1, 501) / 1000)
    np.testing.assert_array_equal(loss.values[-400:], 5 - np.arange(601, 1001) / 1000)
    assert list(history.curves["validation.code.loss"].steps) == list(range(100, 1001, 100))
    assert list(history.curves["tables.blocks.3.hash_ffn.entropy"].steps) == list(range(100, 1001, 100))
    assert [(event.step, event.kind) for event in history.events] == [
        (300, "alarm"),
        (501, "resumed"),
        (508, "skipped"),
    ]
    assert "flops_share" not in history.curves and history.last["step"] == 1000


def test_a_run_that_went_back_to_before_its_only_validation_has_none(tmp_path: Path) -> None:
    first = [record(step, 5.0) for step in range(1, 101)]
    first[-1]["validation_loss"] = 5.0
    run = write_run(tmp_path / "run", first + [record(step, 4.0) for step in range(51, 60)])
    history = read_history(run)
    assert (
        list(history.curves["loss"].steps) == list(range(1, 60)) and "validation_loss" not in history.curves
    )
    assert dict(facts(history))["loss"] == "4.0000"


def test_a_long_curve_keeps_its_mean_and_extremes() -> None:
    curve = Curve()
    dice = np.random.default_rng()
    values = dice.normal(size=10_007)
    curve.steps.extend(range(1, 10_008))
    curve.values.extend(values)
    points = thin(curve, 100)
    spans = np.array_split(np.arange(10_007), [i * 10_007 // 100 for i in range(1, 100)])
    np.testing.assert_allclose(points.means, [values[span].mean() for span in spans])
    np.testing.assert_array_equal(points.least, [values[span].min() for span in spans])
    np.testing.assert_array_equal(points.most, [values[span].max() for span in spans])
    np.testing.assert_allclose(points.steps, [1 + span.mean() for span in spans])
    assert thin(curve, 20_000).means.tolist() == values.tolist()


def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a<b", eventful(1000))
    with pytest.raises(SystemExit) as end:
        main(["report", str(run)])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"{run}/report.html: 1,000 steps, {len(PANELS) - 1} pictures, ")
    page = (run / "report.html").read_text()
    titles = [str(escape(panel.title)) for panel in PANELS if "flops" not in panel.names]
    assert re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,', page) == titles
    assert not re.search(r'(src|href)="(?!data:)|url\(', page)
    for text in (
        "a&lt;b",
        "&lt;b&gt;&amp;",
        "resumed after step 500",
        "step 508</td><td>not trained on: its loss is nan",
        "blocks.3.hash_ffn: tables 2, 6: entropy",
        "4.1000 after step 1,000; least 4.1000",
        "00:08:20",
        "<td>1,024 on average</td>",
        "2.0% of it",
    ):
        assert text in page, text
    assert (run / "report.html").stat().st_size < 2_000_000


def test_what_a_run_has_not_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 3.5}])
    (line,) = report(run, tmp_path / "page.html")
    assert "1 steps, 1 pictures" in line
    assert list(draw(read_history(run))) == ["training and validation loss"]
    page = (tmp_path / "page.html").read_text()
    assert "<h2>events" not in page and "<h2>starts" not in page and "<pre>none</pre>" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{}/nowhere"], "/nowhere: has no metrics.jsonl: name the folder of a run"),
        (["{}/empty"], "/empty: metrics.jsonl holds no step yet"),
        (["{}/run", "--output", "{}/no/x.html"], "/no/x.html: there is no folder"),
        (["{}/run", "--output", "{}/run"], "/run: is a folder: name a file in it"),
    ],
)
def test_mistakes(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run", [record(1, 3.5)])
    write_run(tmp_path / "empty", [])
    with pytest.raises(SystemExit) as end:
        main(["report", *(word.format(tmp_path) for word in arguments)])
    message = capsys.readouterr().err
    assert end.value.code == 2 and words in message and message.count("\n") == 1
    assert {path.name for path in tmp_path.rglob("*")} == {"run", "empty", "config.yaml", "metrics.jsonl"}


def test_the_first_steps_of_phases_are_events(tmp_path: Path) -> None:
    names = ["main"] * 3 + ["ramp"] * 2 + ["anneal"] * 2
    records = [record(step, 2.0, phase=name) for step, name in enumerate(names, 1)]
    run = write_run(tmp_path / "run", records[:5] + records[4:])  # the fifth was trained again
    assert [tuple(event) for event in read_history(run).events] == [
        (4, "phase", "phase ramp begins"),
        (6, "phase", "phase anneal begins"),
    ]
