"""What a job will run, put into its run folder: the package's sources, their version, and how they differ from it.

What a launch changes there stays as a whole, or is undone as a whole (`all_or_nothing`).
"""

from __future__ import annotations

import getpass
import json
import os
import platform
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mf_train
from mf_train.errors import TrainingError, UserError

CODE, VERSION, PATCH = "code", "version.json", "code.patch"
_PACKAGE = Path(mf_train.__file__).resolve().parent
# "shipped": the quickstart's text, which no job needs
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*~", "shipped")
_GIT_SECONDS = 60.0


def write_snapshot(folder: Path, command: Sequence[str], package: Path = _PACKAGE) -> None:
    """Write code/, version.json and, for a changed git tree, code.patch into `folder`. Raises OSError, TrainingError.

    `code/` holds the package alone: put it first in PYTHONPATH and what runs is what was submitted, whatever happens
    to the working tree. The patch has the tree's changed files, and those of the package that git does not know yet.
    """
    shutil.copytree(package, folder / CODE / package.name, ignore=_SKIPPED)
    commit, patch = _git_state(package)
    version: dict[str, Any] = {
        "version": mf_train.__version__,
        "commit": commit,
        "dirty": None if commit is None else bool(patch),
        "source": str(package),
        "python": platform.python_version(),
        "user": _user(),
        "host": socket.gethostname(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "directory": os.getcwd(),
        "command": shlex.join(command),
    }
    (folder / VERSION).write_text(json.dumps(version, indent=1) + "\n", encoding="utf-8")
    if patch:
        (folder / PATCH).write_bytes(patch)


def _git_state(package: Path) -> tuple[str | None, bytes]:
    """The commit and the working tree's difference from it; None outside git, where git is missing, and for an
    installed package that merely lies inside somebody's working tree.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, b""
    commit, top = _git(package, "rev-parse", "HEAD"), _git(package, "rev-parse", "--show-toplevel")
    if commit is None or top is None:
        return None, b""
    root = Path(os.fsdecode(top.rstrip(b"\n")))
    inside = os.path.relpath(package, root.resolve())
    plain = ["diff", "--binary", "--no-ext-diff", "--no-color", "--src-prefix=a/", "--dst-prefix=b/"]
    patch = _git(root, *plain, "HEAD", "--") or b""
    unknown = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "--", inside) or b""
    for name in filter(None, unknown.split(b"\0")):
        # --no-index ends with 1 where the files differ, and they do
        patch += _git(root, *plain, "--no-index", "--", "/dev/null", os.fsdecode(name), expect=(0, 1)) or b""
    return commit.decode().strip(), patch


def _git(folder: Path, *arguments: str, expect: tuple[int, ...] = (0,)) -> bytes | None:
    """The output of git; None where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            timeout=_GIT_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        raise TrainingError(f"git {arguments[0]} in {folder} took more than {_GIT_SECONDS:g} s") from None
    return done.stdout if done.returncode in expect else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return str(os.getuid())


class Changes:
    """New folders, and files and folders that were replaced by others."""

    def __init__(self) -> None:
        self._token = secrets.token_hex(4)
        self._made: list[Path] = []
        self._replaced: list[tuple[Path, Path]] = []

    def make_folder(self, folder: Path) -> None:
        """Make a folder and those above it. Raises UserError where one of them is a file."""
        for path in [*reversed(folder.parents), folder]:
            if path.is_dir():
                continue
            try:
                path.mkdir()
            except FileExistsError:
                if not path.is_dir():
                    raise UserError(f"{path}: is a file; choose another training.output_dir") from None
            else:
                self._made.append(path)

    def make_scratch(self, folder: Path) -> Path:
        """A hidden new folder in `folder`, gone at the end."""
        scratch = folder / f".new-{self._token}"
        scratch.mkdir()
        return scratch

    def replace(self, target: Path, new: Path) -> None:
        """Replace `target` with `new`; where `new` does not exist, only remove `target`."""
        before = target.with_name(f".before-{self._token}-{target.name}")
        self._replaced.append((target, before))
        if target.exists():
            os.rename(target, before)
        if new.exists():
            os.rename(new, target)

    def write(self, target: Path, text: str) -> None:
        """Replace a file by one with this text."""
        new = target.with_name(f".new-{self._token}-{target.name}")
        try:
            new.write_text(text, encoding="utf-8")
            self.replace(target, new)
        finally:
            new.unlink(missing_ok=True)

    def keep(self) -> None:
        """Delete what was replaced."""
        for _, before in self._replaced:
            _remove(before)

    def undo(self) -> None:
        """Put everything back as it was."""
        for target, before in reversed(self._replaced):
            if before.exists():
                _remove(target)
                os.rename(before, target)
            else:
                _remove(target)
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()


@contextmanager
def all_or_nothing(scratch_in: Path) -> Iterator[tuple[Changes, Path]]:
    """Changes that stay if the block ends well, and are undone if it raises; and a scratch folder in `scratch_in`."""
    changes = Changes()
    scratch = None
    try:
        changes.make_folder(scratch_in)
        scratch = changes.make_scratch(scratch_in)
        yield changes, scratch
    except BaseException:
        if scratch is not None:
            _remove(scratch)
        changes.undo()
        raise
    _remove(scratch)
    changes.keep()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
