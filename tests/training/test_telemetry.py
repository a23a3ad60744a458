"""What real runs report on their tables: the same from any number of ranks, and training does not feel it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.checkpoint.layout import step_name
from mf_train.checkpoint.probe import CODES, read_codes
from mf_train.checkpoint.read import CheckpointReader
from tests.training.runs import read_metrics, small_config, train, write_text

TOKENS = 8 * 32  # of a step


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps in one process, reports every 2, checkpoints at 3 and 6; every table is alarming at once."""
    folder = tmp_path_factory.mktemp("reported")
    tree = small_config(folder / "run", write_text(folder / "text.jsonl"))
    tree["training"] |= {"steps": 8, "validation_interval": 4}
    tree["checkpoint"] = {"interval": 3, "keep": 0}
    tree["logging"] |= {"telemetry_interval": 2, "alarm_entropy": 1.0}
    done = train(tree)
    (folder / "said").write_text(done.stdout)
    return folder / "run"


def again(reported: Path, folder: Path, *overrides: str, processes: int = 1) -> list[dict[str, Any]]:
    """The metrics of the same run in another folder."""
    tree = yaml.safe_load((reported.parent / "run.yaml").read_text())
    tree["training"]["output_dir"] = str(folder)
    train(tree, *overrides, processes=processes)
    return read_metrics(folder)


def tables(metrics: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, Any]]]:
    return {entry["step"]: entry["tables"] for entry in metrics if "tables" in entry}


def test_every_step_is_counted_once(reported: Path) -> None:
    metrics = read_metrics(reported)
    assert list(tables(metrics)) == [2, 4, 6, 8]
    assert [entry["tables_tokens"] for entry in metrics if "tables" in entry] == [2 * TOKENS] * 4
    for summary in tables(metrics)[8].values():
        assert summary.keys() == {
            *("rows_read", "entropy", "gini", "largest_share"),
            *("bit_imbalance", "bit_imbalance_worst", "bit_imbalances"),
            *("alarming_tables", "codes_changed"),
        }
        assert 0 < summary["rows_read"] <= 1 and 0 < summary["entropy"] <= 1
        assert 0 <= summary["gini"] < 1 and 0 < summary["largest_share"] <= 1
        assert summary["bit_imbalance"] <= summary["bit_imbalance_worst"] <= 0.5


def test_losses_do_not_feel_it(reported: Path, tmp_path: Path) -> None:
    without = again(reported, tmp_path / "run", "logging.telemetry_interval=0")
    assert not tables(without)
    for key in ("loss", "grad_norm", "validation_loss", "batch_digest"):
        assert [entry.get(key) for entry in without] == [entry.get(key) for entry in read_metrics(reported)]


def test_codes_are_compared_with_the_last_checkpoint(reported: Path, tmp_path: Path) -> None:
    metrics = {entry["step"]: entry for entry in read_metrics(reported) if "tables" in entry}
    assert {step: entry["codes_changed_since"] for step, entry in metrics.items()} == {
        2: None,
        4: 3,
        6: 3,
        8: 6,
    }
    assert all("codes_changed" not in summary for summary in metrics[2]["tables"].values())
    checkpoints = [
        read_codes(CheckpointReader(reported / "checkpoints" / step_name(step))) for step in (3, 6)
    ]
    for name, summary in metrics[6]["tables"].items():
        before, after = (codes[CODES + name] for codes in checkpoints)
        assert summary["codes_changed"] == (before != after).double().mean().item()
    assert any(summary["codes_changed"] for summary in metrics[6]["tables"].values())
    resumed = again(
        reported, tmp_path / "run", f"checkpoint.resume={reported / 'checkpoints' / step_name(6)}"
    )
    (entry,) = [entry for entry in resumed if "tables" in entry]
    assert (entry["step"], entry["codes_changed_since"]) == (8, 6)
    assert entry["tables"] == metrics[8]["tables"]
    assert entry["tables_tokens"] == 2 * TOKENS


def test_alarms_are_said_once(reported: Path) -> None:
    first, *others = [entry for entry in read_metrics(reported) if "tables" in entry]
    assert sorted(alarm["hash"] for alarm in first["alarms"]) == sorted(first["tables"])
    assert all(alarm["tables"] == list(range(8)) for alarm in first["alarms"])
    assert {summary["alarming_tables"] for summary in first["tables"].values()} == {8}
    assert not any("alarms" in entry for entry in others)
    said = [line for line in (reported.parent / "said").read_text().splitlines() if "warning: step" in line]
    assert len(said) == 6 and said[0].startswith(
        "warning: step 2: layer 0 qkv: tables 0, 1, 2, 3 and 4 more: "
    )


@pytest.mark.parametrize(
    "degrees",
    [
        (2, 1, 1),
        pytest.param((1, 2, 2), marks=pytest.mark.slow),
        pytest.param((2, 2, 3), marks=pytest.mark.slow),
    ],
)
def test_any_degrees_report_the_same(degrees: tuple[int, int, int], reported: Path, tmp_path: Path) -> None:
    """To the bit, at the first step: its weights are equal, and those of later ones differ in roundings."""
    tensor, data, stage = degrees
    short = ("training.steps=1", "logging.telemetry_interval=1")
    overrides = (f"parallel.tensor={tensor}", f"parallel.zero_stage={stage}")
    (expected,) = again(reported, tmp_path / "one", *short)
    (found,) = again(reported, tmp_path / "many", *short, *overrides, processes=tensor * data)
    for key in ("tables", "tables_tokens", "codes_changed_since", "alarms"):
        assert found[key] == expected[key]
    assert found["tables_tokens"] == TOKENS and len(found["tables"]) == 6


def test_a_dense_run_has_no_tables(tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["model"]["kind"] = "dense"
    tree["training"]["steps"] = 2
    tree["logging"]["telemetry_interval"] = 1
    train(tree)
    assert tables(read_metrics(tmp_path / "run")) == {1: {}, 2: {}}
