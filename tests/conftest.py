"""Fixtures for every test."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

import tests.examples  # noqa: F401 - registers the profiles
from mf_train.kernels.build import cache_folder
from tests.environments import make_bare_environment

hypothesis.settings.load_profile("fast")  # before --hypothesis-profile, and the tests' modules, are read

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """What tests and the processes they start read is cached apart from the user's; compiled kernels are shared."""
    folder = Path(tempfile.mkdtemp(prefix="memoryformer-tests-"))
    kernels = cache_folder()
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "mf_train").mkdir()
    (folder / "mf_train" / "kernels").symlink_to(kernels.resolve())
    os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's folder."""
    return REPOSITORY


@pytest.fixture(scope="session")
def bare_environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], Path]:
    """`bare_environment(["torch"])`: the python of an environment with just these distributions.

    With what they require, and nothing else that is installed here; this project is not in it. Made once for
    each list. Run it with `-P` or from a folder without `mf_train` to keep this checkout out, and from the
    repository's folder, with `-c` or `-m`, to have it in.
    """
    made: dict[tuple[str, ...], Path] = {}

    def make(distributions: list[str]) -> Path:
        key = tuple(sorted(distributions))
        if key not in made:
            made[key] = make_bare_environment(tmp_path_factory.mktemp("bare"), list(key))
        return made[key]

    return make
