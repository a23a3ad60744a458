"""`memoryformer launch` called in the test's own process, and what it leaves."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.cli import main
from tests.launch.cluster import Cluster
from tests.training.runs import small_config, write_text

SIZE = ["--nodes", "2", "--tasks-per-node", "2", "--time", "10"]


# In the place of the job's python: the starters, the ranks' own processes and the report are real.
_STAND_IN = """
import json, os, runpy, signal, sys, time
from pathlib import Path
program = PROGRAM
_, module, *sys.argv[1:] = [word for word in sys.argv[1:] if word != "-u"]
if module == "mf_train.launch.launch_folder":
    print("run")  # for a job by hand
elif module != "mf_train.launch.rank":
    os.environ["PYTHON_EXEC"] = sys.argv[0]  # torchrun starts its ranks with it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
else:
    from mf_train.launch.rank import run_rank
    from mf_train.parallel.processes import find_process
    logs, process = Path(sys.argv[1]), find_process()
    sys.exit(run_rank(logs, lambda: exec(program, globals())))
"""


class Launcher:
    """Calls the command line in a folder and keeps what it printed."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.run = folder / "run"
        self.config = folder / "config.yaml"
        self.tree: dict[str, Any] = small_config(self.run, write_text(folder / "text.jsonl"))
        self.tree["checkpoint"] = {"interval": 4}
        self._capsys = capsys
        self.errors = ""

    def __call__(self, *arguments: str | Path, expect: int = 0) -> str:
        """`memoryformer launch ARGUMENTS`, CONFIG written before; standard output. Asserts the exit status."""
        self.config.write_text(yaml.safe_dump(self.tree))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["launch", *map(str, arguments)])
        told = self._capsys.readouterr()
        self.errors = told.err
        assert ended.value.code == expect, told.out + told.err
        return told.out

    def refused(self, *arguments: str | Path) -> str:
        """The one line that a mistake prints; nothing may have been written."""
        before = sorted(self.folder.rglob("*"))
        assert self(self.config, *arguments, expect=2) == ""
        assert {*self.folder.rglob("*")} - {self.config} == {*before} - {self.config}
        lines = [line for line in self.errors.splitlines() if "warning: " not in line]
        assert len(lines) == 1 and lines[0].startswith("memoryformer: "), self.errors
        return lines[0]

    def submit(self, *arguments: str | Path) -> str:
        """The new job's number."""
        return self(self.config, *arguments, "--parsable").strip()


def without_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH holds git and a shell alone."""
    programs = folder / "programs"
    programs.mkdir()
    for name in ("git", "bash"):
        (programs / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(programs))


def stand_in(folder: Path, program: str) -> Path:
    """An executable in the place of the job's python, whose ranks run `program`; it has `process` and `logs`."""
    path = folder / "stand-in"
    path.write_text(f"#!{sys.executable}\n{_STAND_IN.replace('PROGRAM', repr(program))}")
    path.chmod(0o755)
    return path


def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM's commands of this process speak to the cluster."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
