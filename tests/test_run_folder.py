"""Records of a run that is still being written."""

from __future__ import annotations

import json
from pathlib import Path

from mf_train.run_folder import last_metrics, read_metrics, tail_lines
from mf_train.training.metrics import cut_metrics


def test_what_is_no_whole_record_is_left_out(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == [] and last_metrics(tmp_path) == {}
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n[1]\n{"step": 2, "loss": NaN}\n{"step": 3}\n{"st')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]
    assert last_metrics(tmp_path) == {"step": 3}


def test_the_newest_record_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10_000)))
    assert last_metrics(tmp_path) == {"step": 9999}
    assert len(tail_lines(path, 100)) < 10


def test_cutting_keeps_whole_records_up_to_a_step(tmp_path: Path) -> None:
    cut_metrics(tmp_path, 2)  # nothing there
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\nnoise\n{"loss": 1}\n{"step": 3}\n{"step": 2}')
    cut_metrics(tmp_path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["metrics.jsonl"]
