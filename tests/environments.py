"""Virtual environments that hold a chosen few of the installed distributions, made in a second by links."""

from __future__ import annotations

import importlib.metadata
import sys
import venv
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def make_bare_environment(folder: Path, distributions: list[str]) -> Path:
    """Makes a virtual environment with `distributions` and what they require; returns its python.

    Its site-packages links to the files of the running environment, so nothing is downloaded or copied.
    """
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site_packages = folder / "lib" / version / "site-packages"
    for name in requirement_closure(distributions):
        for path in _top_level_paths(importlib.metadata.distribution(name)):
            link = site_packages / path.name
            if not link.exists():  # a namespace package has several distributions
                link.symlink_to(path)
    return folder / "bin" / "python"


def requirement_closure(distributions: list[str]) -> set[str]:
    """Names of `distributions` and of everything that they require on this machine, without extras."""
    closure: set[str] = set()
    waiting = list(distributions)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in closure:
            continue
        closure.add(name)
        for text in importlib.metadata.distribution(name).requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return closure


def _top_level_paths(distribution: importlib.metadata.Distribution) -> set[Path]:
    """The files and folders of site-packages that belong to the distribution."""
    names = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
    return {Path(str(distribution.locate_file(name))) for name in names}
