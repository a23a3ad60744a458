"""The command line: its help, and every mistake in one line with the right exit status."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.checkpoint.layout import resolve_checkpoint
from mf_train.cli import main
from tests.training.runs import complaints, run_command, small_config, train, write_text

VERBS = [
    ["train"],
    ["tokenizer", "train"],
    ["data", "inspect"],
    ["data", "tokenize"],
    ["convert"],
    ["generate"],
    ["evaluate"],
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_shows_an_example(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb, "--help"])
    assert ended.value.code == 0
    assert f"example: memoryformer {' '.join(verb)} " in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["convert", "only-one"]], ids=str)
def test_wrong_usage_ends_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))


def say(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake prints, after checking the status."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("memoryformer: ")
    return line


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.stpes=3", "unknown key 'training.stpes': did you mean 'steps'?"),
        ("traning.steps=3", "unknown key 'traning': did you mean 'training'?"),
        ("training.steps=many", "training.steps is 'many': expected a whole number"),
        ("model.bits=5", "model.bits 5 does not divide model.hidden_size 32"),
        ("model.num_heads=5", "model.num_heads 5 does not divide model.hidden_size 32"),
        ("parallel.tensor=2", "parallel.tensor 2 does not divide the number of processes 1"),
        ("training.micro_batch_size=0", "training.micro_batch_size is 0"),
        ("parallel.reduce_dtype=float16", "parallel.reduce_dtype is 'float16'"),
        ("parallel.zero_stage=4", "parallel.zero_stage is 4: choose 0, 1, 2 or 3"),
        ("parallel.bucket_size=0", "parallel.bucket_size is 0"),
        ("parallel.overlap=2", "parallel.overlap is 2"),
        ("training.steps", "write it as section.key=value"),
    ],
)
def test_mistakes_in_the_configuration(
    tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, expected: str
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    assert expected in say(["train", str(config), override], capsys)
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such configuration file" in say(["train", str(tmp_path / "none.yaml")], capsys)


@pytest.mark.parametrize(
    ("processes", "overrides", "expected"),
    [
        (
            2,
            ["model.hidden_size=40", "model.bits=8", "parallel.tensor=2"],
            "does not divide the number of tables",
        ),
        (
            2,
            ["model.num_heads=1", "parallel.tensor=2"],
            "parallel.tensor 2 does not divide model.num_heads 1",
        ),
        (
            2,
            ["training.global_batch_size=1"],
            "training.global_batch_size 1 leaves some of 2 data-parallel ranks without a sequence",
        ),
    ],
)
def test_degrees_that_cannot_work_end_every_process_with_one_line(
    tree: dict[str, Any], processes: int, overrides: list[str], expected: str
) -> None:
    (line,) = complaints(train(tree, *overrides, processes=processes, expect=2))
    assert expected in line


def _truncated(path: Path) -> None:
    whole = gzip.compress(
        b"".join(json.dumps({"text": f"line {i} " * 50}).encode() + b"\n" for i in range(500))
    )
    path.write_bytes(whole[: len(whole) // 2])


DATA_MISTAKES = {
    "missing file": ("gone.jsonl", None, "gone.jsonl"),
    "empty glob": ("none-*.jsonl", None, "none-*.jsonl"),
    "truncated gz": ("cut.jsonl.gz", _truncated, "cut.jsonl.gz"),
    "not JSON": ("bad.jsonl", lambda p: p.write_text('{"text": "a"}\n{"text": \n'), "bad.jsonl: line 2"),
    "no text": ("bad.jsonl", lambda p: p.write_text('{"text": "a"}\n{"txt": "b"}\n'), "bad.jsonl: line 2"),
    "not UTF-8": (
        "bad.jsonl",
        lambda p: p.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n'),
        "bad.jsonl: line 2",
    ),
}


@pytest.mark.parametrize("case", DATA_MISTAKES)
def test_mistakes_in_the_data(tree: dict[str, Any], tmp_path: Path, case: str) -> None:
    name, make, expected = DATA_MISTAKES[case]
    if make is not None:
        make(tmp_path / name)
    tree["data"]["train"] = [{"path": str(tmp_path / name)}]
    (line,) = complaints(train(tree, expect=2))
    assert expected in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mistake_that_only_some_processes_could_meet_is_told_once(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["data"]["train"] = [{"path": str(tmp_path / "gone.jsonl")}]
    (line,) = complaints(train(tree, processes=2, expect=2))
    assert "gone.jsonl" in line


def test_a_tokenizer_larger_than_the_model(tree: dict[str, Any]) -> None:
    (line,) = complaints(train(tree, "model.vocab_size=4088", expect=2))
    assert "model.vocab_size is 4088" in line and "4096" in line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its configuration."""
    folder = tmp_path_factory.mktemp("finished")
    train(small_config(folder / "run", write_text(folder / "text.jsonl")), "training.steps=2")
    return folder


class TestAnExistingRun:
    """What refuses to continue or to overwrite a run."""

    @pytest.fixture
    def copy(self, finished: Path, tmp_path: Path) -> dict[str, Any]:
        shutil.copytree(finished / "run", tmp_path / "run")
        tree: dict[str, Any] = yaml.safe_load((finished / "run.yaml").read_text())
        tree["training"] |= {"output_dir": str(tmp_path / "run"), "steps": 3}
        return tree

    def test_of_another_model(self, copy: dict[str, Any]) -> None:
        (line,) = complaints(train(copy, "model.num_layers=3", expect=2))
        assert "model.num_layers is 2 there and 3 here" in line and "training.output_dir" in line

    def test_that_would_be_overwritten(self, copy: dict[str, Any]) -> None:
        (line,) = complaints(train(copy, "checkpoint.resume=never", expect=2))
        assert "step-000000002" in line and "checkpoint.resume=auto" in line

    def test_on_other_data(self, copy: dict[str, Any], tmp_path: Path) -> None:
        copy["data"]["train"] = [{"path": str(write_text(tmp_path / "other.jsonl", 30))}]
        (line,) = complaints(train(copy, expect=2))
        assert "data.train[0]" in line

    def test_whose_checkpoint_lacks_a_file(self, copy: dict[str, Any], tmp_path: Path) -> None:
        lost = next(resolve_checkpoint(tmp_path / "run").glob("exp_avg-*"))
        lost.unlink()
        done = train(copy, processes=2, expect=2)
        (line,) = complaints(done)
        assert "step-000000002.damaged" in line and "checkpoint.resume=PATH" in line
        assert (
            f"step-000000002 is damaged and was renamed to step-000000002.damaged: {lost.name}: missing"
            in (done.stdout)
        )

    def test_whose_checkpoint_has_a_truncated_file(self, copy: dict[str, Any], tmp_path: Path) -> None:
        cut = next(resolve_checkpoint(tmp_path / "run").glob("weights-*"))
        cut.write_bytes(cut.read_bytes()[:-100])
        copy["checkpoint"] = {"resume": str(cut.parent)}
        (line,) = complaints(train(copy, expect=2))
        assert f"step-000000002: {cut.name}: damaged" in line and "choose another checkpoint.resume" in line
        assert cut.is_file()

    def test_named_as_a_checkpoint_that_is_not_there(self, copy: dict[str, Any], tmp_path: Path) -> None:
        (line,) = complaints(train(copy, f"checkpoint.resume={tmp_path / 'nowhere'}", expect=2))
        assert "nowhere: no such checkpoint" in line

    def test_that_can_be_inspected(self, copy: dict[str, Any], tmp_path: Path) -> None:
        """The batch that `data inspect` shows for a step has the digest that the run recorded."""
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(copy))
        done = run_command(["data", "inspect", str(config), "--step", "2"])
        recorded = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
        assert done.returncode == 0 and recorded["batch_digest"] in done.stdout


def test_options_of_another_conversion(finished: Path, tmp_path: Path) -> None:
    for options, words in (
        (["--tensor", "2"], "--tensor does not go with a conversion to a standalone model"),
        (["--check", "--dtype", "int8"], "--dtype does not go with --check"),
        (["--to-checkpoint", "--dtype", "int8"], "--dtype does not go with --to-checkpoint"),
    ):
        done = run_command(["convert", str(finished / "run"), str(tmp_path / "out"), *options])
        assert done.returncode == 2 and words in done.stderr and not (tmp_path / "out").exists()


def test_checkpoints_can_be_listed_and_verified(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    listed = run_command(["checkpoint", "list", str(tmp_path / "run")])
    assert listed.returncode == 0 and re.match(r"step-000000002 .* latest\n", listed.stdout)
    verified = run_command(["checkpoint", "verify", str(tmp_path / "run")])
    assert verified.returncode == 0 and "step-000000002: good" in verified.stdout
    victim = next(resolve_checkpoint(tmp_path / "run").glob("exp_avg_sq-*"))
    data = bytearray(victim.read_bytes())
    data[-5] ^= 1
    victim.write_bytes(data)
    refused = run_command(["checkpoint", "verify", str(tmp_path / "run")])
    assert refused.returncode == 1 and victim.name in refused.stderr


def test_a_reader_that_has_seen_enough_is_no_error(repository: Path) -> None:
    command = [sys.executable, "-m", "mf_train", "data", "inspect", "configs/quickstart.yaml"]
    process = subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith("tokenizer ")
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
