"""The command line of `memoryformer launch` and its verbs."""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mf_train.cli import main
from mf_train.commands import CommandParser
from mf_train.config import Config
from mf_train.launch.arguments import add_launch, options_from
from mf_train.launch.options import JobOptions


def parse(*words: str) -> JobOptions:
    parser = argparse.ArgumentParser()
    add_launch(parser.add_subparsers(parser_class=CommandParser))
    return options_from(parser.parse_args(["launch", "config.yaml", *words]))


@pytest.mark.parametrize("verb", ["launch", "launch status", "launch stop", "launch logs"])
def test_help_shows_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*verb.split(), "--help"])
    assert ended.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"usage: memoryformer {verb} " in told or f"memoryformer {verb} [-h]" in told
    assert f"example: memoryformer {verb} " in told


def test_a_check_takes_the_options_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def check(config: Config, options: JobOptions) -> int:
        found.append((config.training.seed, config.training.output_dir, options.array))
        return 0

    monkeypatch.setattr("mf_train.launch.check.check", check)
    overrides = ["training.seed={task}", f"training.output_dir={tmp_path}/seed-{{task}}"]
    words = ["--check", "--array", "3-5", "--tasks-per-node", "2", "--time", "9"]
    with pytest.raises(SystemExit) as ended:
        main(["launch", "configs/quickstart.yaml", *overrides, *words])
    assert ended.value.code == 0
    assert found == [(3, f"{tmp_path}/seed-3", "3-5")]


def test_the_python_of_the_nodes() -> None:
    options = JobOptions(tasks_per_node=1)
    assert options.node_python == sys.executable
    assert replace(options, container="image.sif").node_python == "python"
    assert replace(options, container="image.sif", python="/opt/python").node_python == "/opt/python"


@pytest.mark.parametrize("words", [["status"], ["stop"], ["logs", "--rank", "1"]])
def test_a_verb_is_the_word_after_launch(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Anything else is a configuration, also one of a verb's name in a folder."""
    with pytest.raises(SystemExit) as ended:
        main(["launch", *words, str(tmp_path)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"memoryformer: {tmp_path}: no job was launched for this folder"
    )
    with pytest.raises(SystemExit):
        main(["launch", str(tmp_path / words[0]), "--tasks-per-node=1"])
    assert capsys.readouterr().err.startswith(
        f"memoryformer: {tmp_path / words[0]}: no such configuration file"
    )


def test_what_is_left_out_has_its_default() -> None:
    assert parse() == JobOptions()


def test_every_option_arrives() -> None:
    given = parse(
        *"--nodes 3 --gpus-per-node 8 --tasks-per-node 2 --cpus-per-task 4 --elastic 1:3 --gpu-memory 141".split(),
        *"--no-exclusive --time 1-0 --partition p --account a --qos q --job-name j --array 0-2".split(),
        *"--dependency afterok:1 --sbatch=--constraint=x --sbatch=--contiguous --starter srun".split(),
        *"--notice 60 --retries 4 --python py --container i --container-mounts a:b".split(),
    )
    assert given == JobOptions(
        nodes=3,
        gpus_per_node=8,
        tasks_per_node=2,
        cpus_per_task=4,
        elastic=(1, 3),
        gpu_memory=141,
        exclusive=False,
        time="1-0",
        partition="p",
        account="a",
        qos="q",
        job_name="j",
        array="0-2",
        dependency="afterok:1",
        sbatch=("--constraint=x", "--contiguous"),
        starter="srun",
        notice=60,
        retries=4,
        python="py",
        container="i",
        container_mounts=("a:b",),
    )


@pytest.mark.parametrize(
    "words", [["--dry-run", "--check"], ["--starter", "ssh"], ["--nodes", "two"], ["--rank", "1"]]
)
def test_wrong_usage_ends_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["launch", "config.yaml", *words])
    assert ended.value.code == 2


def test_the_login_node_needs_no_torch_to_look_at_runs(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None  # any import of it fails
from mf_train.cli import main
from mf_train.commands import CommandParser
for verb in ("status", "stop", "logs"):
    try:
        main(["launch", verb, "nowhere"])
    except SystemExit as ended:
        assert ended.code == 2, ended.code
import mf_train.launch.submit
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("nowhere: no such folder") == 3
