"""What a job's folder keeps of the code that runs in it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mf_train
from mf_train.launch.snapshot import write_snapshot

PACKAGE = Path(mf_train.__file__).parent


def git(folder: Path, *arguments: str) -> str:
    name = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *name, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a small package of the same name."""
    package = tmp_path / "source" / "mf_train"
    (package / "kernels" / "csrc").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '9'\n")
    (package / "kernels" / "csrc" / "op.cpp").write_text("int one;\n")
    (tmp_path / "source" / ".gitignore").write_text("__pycache__/\n")
    git(tmp_path / "source", "init", "--quiet")
    git(tmp_path / "source", "add", ".")
    git(tmp_path / "source", "commit", "--quiet", "--message", "first")
    return package


def snapshot(tmp_path: Path, package: Path) -> tuple[Path, dict[str, object]]:
    folder = tmp_path / "launch"
    folder.mkdir()
    write_snapshot(folder, ["memoryformer", "launch", "a b.yaml"], package)
    version: dict[str, object] = json.loads((folder / "version.json").read_text())
    return folder, version


def test_of_a_clean_tree(tmp_path: Path, tree: Path) -> None:
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "x.pyc").touch()
    folder, version = snapshot(tmp_path, tree)
    assert version["commit"] == git(tree, "rev-parse", "HEAD")
    assert version["dirty"] is False
    assert version["command"] == "memoryformer launch 'a b.yaml'"
    assert not (folder / "code.patch").exists()
    copied = {str(p.relative_to(folder / "code")) for p in (folder / "code").rglob("*") if p.is_file()}
    assert copied == {"mf_train/__init__.py", "mf_train/kernels/csrc/op.cpp"}


def test_the_patch_of_a_dirty_tree_makes_it_from_the_commit(tmp_path: Path, tree: Path) -> None:
    (tree / "__init__.py").write_text("__version__ = '10'\n")
    (tree / "kernels" / "csrc" / "op.cpp").unlink()
    (tree / "new module.py").write_text("x = 1\n")
    (tree / "data.bin").write_bytes(bytes(range(256)))
    git(tree, "config", "diff.noprefix", "true")
    folder, version = snapshot(tmp_path, tree)
    assert version["dirty"] is True
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(tree.parent), str(clone))
    git(clone, "apply", str(folder / "code.patch"))
    for copy in (clone, folder / "code"):
        assert (copy / "mf_train" / "__init__.py").read_text() == "__version__ = '10'\n"
        assert not (copy / "mf_train" / "kernels" / "csrc" / "op.cpp").exists()
        assert (copy / "mf_train" / "new module.py").read_text() == "x = 1\n"
        assert (copy / "mf_train" / "data.bin").read_bytes() == bytes(range(256))


def test_outside_git(tmp_path: Path, tree: Path) -> None:
    shutil.rmtree(tree.parent / ".git")
    folder, version = snapshot(tmp_path, tree)
    assert version["commit"] is None and version["dirty"] is None
    assert not (folder / "code.patch").exists()
    assert (folder / "code" / "mf_train" / "__init__.py").is_file()


def test_installed_inside_somebody_elses_repository(tmp_path: Path, tree: Path) -> None:
    installed = tree.parent / "env" / "mf_train"
    shutil.copytree(tree, installed)
    (tree.parent / ".gitignore").write_text("env/\n")
    _, version = snapshot(tmp_path, installed)
    assert version["commit"] is None


def test_what_runs_is_the_copy(tmp_path: Path) -> None:
    """With the folder first in PYTHONPATH, also when the working directory holds another mf_train."""
    folder, _ = snapshot(tmp_path, PACKAGE)
    code = "import mf_train.launch.render as r; print(r.TEMPLATE, r.TEMPLATE.is_file())"
    environment = {**os.environ, "PYTHONPATH": str(folder / "code"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PACKAGE.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == [str(folder / "code" / "mf_train" / "launch" / "train.sbatch"), "True"]
