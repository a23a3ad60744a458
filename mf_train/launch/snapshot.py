"""What a job will run, kept in its run folder: the package's sources, their version, and how they differ from it."""

import getpass
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mf_train
from mf_train.errors import TrainingError

CODE, VERSION, PATCH = "code", "version.json", "code.patch"
_PACKAGE = Path(mf_train.__file__).resolve().parent
_SKIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", ".*", "*~")
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
    """What git prints; None where it cannot say."""
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
