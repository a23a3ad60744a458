"""The quickstart without the repository: what is written where, what is in its way, and all four parts."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mf_train
from mf_train.errors import UserError
from mf_train.quickstart.run import CONFIG, place_files
from tests.training.runs import REPOSITORY


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_all_that_the_configuration_names_is_written_once(tmp_path: Path) -> None:
    assert place_files(tmp_path) == len(files_in(tmp_path)) > 5
    for name in files_in(tmp_path):
        assert filecmp.cmp(tmp_path / name, REPOSITORY / name, shallow=False), name
    texts = {
        str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "configs/quickstart-text").glob("*/*.gz")
    }
    assert texts | {str(CONFIG), "tokenizer/tokenizer.model"} < files_in(tmp_path)
    (tmp_path / CONFIG).write_text("own: settings")
    assert place_files(tmp_path) == 0 and (tmp_path / CONFIG).read_text() == "own: settings"


def test_what_is_in_the_way_is_named_before_anything_is_written(tmp_path: Path) -> None:
    own = tmp_path / "tokenizer" / "tokenizer.model"
    own.parent.mkdir()
    own.write_bytes(b"another one")
    with pytest.raises(UserError, match=r"tokenizer.model is there already, and not the quickstart's"):
        place_files(tmp_path)
    assert files_in(tmp_path) == {"tokenizer/tokenizer.model"}


def test_an_interrupted_copy_is_continued(tmp_path: Path) -> None:
    number = place_files(tmp_path)
    (tmp_path / CONFIG).unlink()
    (tmp_path / "tokenizer" / "tokenizer.model").unlink()
    assert place_files(tmp_path) == number and (tmp_path / CONFIG).exists()


def test_the_wheel_has_the_files(tmp_path: Path) -> None:
    place_files(tmp_path)
    package = Path(mf_train.__file__).parent
    patterns = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    shipped = {path for pattern in patterns["mf_train"] for path in package.glob(pattern)}
    assert {package / "quickstart" / "shipped" / name for name in files_in(tmp_path)} <= shipped


@pytest.mark.slow
@pytest.mark.distributed
def test_all_parts_in_an_empty_folder(tmp_path: Path) -> None:
    """Its batches are those of `train` in the repository's folder, whose paths differ."""
    short = ["training.steps=2", "training.validation_sequences=4"]
    command = [sys.executable, "-m", "mf_train"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "quickstart", *short], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "[0/4] wrote configs/quickstart.yaml",
        "[4/4] drawing",
        "runs/quickstart/report.html: 2 steps",
    ):
        assert words in done.stdout
    assert (tmp_path / "runs/quickstart/model/config.json").exists()
    there = [f"training.output_dir={tmp_path / 'there'}", "parallel.tensor=1", *short]
    subprocess.run([*command, "train", str(CONFIG), *there], cwd=REPOSITORY, env=environment, check=True)
    mine, its = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("runs/quickstart", "there")
    )
    assert [one["batch_digest"] for one in mine] == [one["batch_digest"] for one in its]
    assert [one["loss"] for one in mine] == [one["loss"] for one in its]
