"""Fixtures for every test."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mf_train.files import user_cache
from mf_train.stop_signals import STOP_SIGNALS
from tests.environments import make_bare_environment

with suppress(ImportError):  # on a machine that has what tests/gpu needs alone
    import hypothesis

    import tests.examples  # noqa: F401 - registers the profiles

    hypothesis.settings.load_profile("fast")  # before --hypothesis-profile, and the tests' modules, are read

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
LEFT_OUT = "not slow and not slurm"  # as pyproject.toml's addopts have it
LONGEST = (
    "kernels/test_triton.py",
    "standalone/exported/test_behaviour.py",
    "parallel/test_engine.py",
    "training/test_stopping.py",
    "test_imports.py",
    "parallel/test_zero.py",
    "checkpoint/test_elastic.py",
    "training/test_profile.py",
    "standalone/conversion/test_check.py",
    "planning/test_plan.py",
    "training/test_warm_up.py",
    "training/test_run.py",
    "standalone/conversion/test_int8.py",
    "benchmarks/test_gpu.py",
    "training/test_any_ranks.py",
    "training/test_run_data.py",
    "kernels/test_cuda.py",
    "model/test_documents.py",
    "kernels/test_lookup.py",
    "standalone/use/test_use.py",
    "standalone/conversion/test_convert.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """What tests and the processes they start read is cached apart from the user's; compiled kernels are shared."""
    folder = Path(tempfile.mkdtemp(prefix="memoryformer-tests-"))
    kernels = user_cache() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (folder / "mf_train").mkdir()
    (folder / "mf_train" / "kernels").symlink_to(kernels.resolve())
    os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest come first where workers share the files, so that they end at about the same time."""
    if hasattr(config, "workerinput"):
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.relative_to(TESTS).as_posix(), len(LONGEST)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was skipped and why, a line for each reason, and the parts of the suite that the marks leave out."""
    found = defaultdict[str, list[str]](list)
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            file = os.path.relpath(report.nodeid.partition("::")[0])
            # of files that are skipped as a whole for one reason, workers report the first alone
            place = file if "::" in report.nodeid else f"{os.path.dirname(file)}/ (whole files)"
            found[" ".join(report.longrepr[2].removeprefix("Skipped: ").split())].append(place)
    lines = []
    for reason, places in sorted(found.items()):
        names = sorted(set(places))
        more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
        tests = sum("(whole" not in place for place in places)
        lines.append(f"{f'{tests} in ' if tests else ''}{', '.join(names[:3])}{more}: {reason}")
    if config.option.markexpr == LEFT_OUT:
        lines.append(
            "slow tests: make drills; killed and damaged runs: make faults; SLURM: make slurm-quick, slurm"
        )
    if lines:
        terminalreporter.section("skipped")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """A command that runs inside pytest leaves its handlers of signals: later forks would not end at SIGTERM."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler and handler is not None:
            signal.signal(number, handler)


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
