"""The drills' reference runs, and the table that sums them up."""

from __future__ import annotations

import random
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from tests.faults.drill import INTERVAL, KEEP, Loss, Run, drill_config
from tests.tables import verdict, write_table
from tests.training.runs import write_text

MakeRun = Callable[..., Run]

_CASE, _LOSS, _FAILURE, _RECOVERY = (f"drill: {what}" for what in ("case", "loss", "failure", "recovery"))
_HEADINGS = ("case", "moments", "steps done again", "lost beyond", "failure s", "recovery s", "verdict")
_SEED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-seed", type=int, default=None, help="seed of the drills' random moments")


class Drill:
    """A test's row in the table, and its random numbers."""

    def __init__(self, record: Callable[[str, Any], None], generator: random.Random) -> None:
        self._record = record
        self.random = generator

    def case(self, name: str) -> None:
        """Names the row; tests of the same name share one."""
        self._record(_CASE, name)

    def struck(self, loss: Loss) -> None:
        """A fault struck, and this is what has to be trained again."""
        self._record(_LOSS, astuple(loss))  # what one worker of pytest-xdist can tell
        assert loss.beyond <= 0, f"{loss.again} steps lost where the interval is {INTERVAL}: {loss}"

    def recovered(self, seconds: float) -> None:
        """Seconds from a start after a fault to its first step."""
        self._record(_RECOVERY, seconds)

    def failed(self, seconds: float) -> None:
        """Seconds from a fault to the end of the start that it struck."""
        self._record(_FAILURE, seconds)


@pytest.fixture
def drill(record_property: Callable[[str, Any], None], request: pytest.FixtureRequest) -> Drill:
    """The test's row. Random numbers are of --faults-seed, or of a seed drawn anew; the table names it."""
    stash = request.config.stash
    if _SEED not in stash:
        given = request.config.getoption("faults_seed", default=None)
        stash[_SEED] = random.SystemRandom().randrange(10**6) if given is None else given
    return Drill(record_property, random.Random(f"{stash[_SEED]} {request.node.nodeid}"))


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Run]:
    """`reference(processes, steps)`: that run undisturbed, made once."""
    made: dict[tuple[int, int], Run] = {}
    text = write_text(tmp_path_factory.mktemp("text") / "text.jsonl")

    def make(processes: int, steps: int) -> Run:
        if (processes, steps) not in made:
            folder = tmp_path_factory.mktemp(f"reference-{processes}-{steps}")
            run = Run(drill_config(folder / "run", steps, text), folder, processes)
            start = run.start()
            assert start.end() == 0, start.text()
            made[processes, steps] = run
        return made[processes, steps]

    return make


@pytest.fixture
def make_run(
    reference: Callable[[int, int], Run], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[MakeRun]:
    """`make_run(processes, steps, folder=, keep=, key=value of training)`: a run; removed where the test passes."""
    failed = request.session.testsfailed
    runs = []

    def make(
        processes: int, steps: int, folder: Path | None = None, keep: int = KEEP, **training: Any
    ) -> Run:
        undisturbed = reference(processes, steps)
        tree = drill_config(folder or tmp_path / "run", steps, undisturbed.text)
        tree["training"] |= training
        tree["checkpoint"]["keep"] = keep
        runs.append(Run(tree, tmp_path, processes, undisturbed))
        return runs[-1]

    yield make
    for run in runs:
        for start in run.starts:
            start.kill()
    if request.session.testsfailed == failed:
        shutil.rmtree(tmp_path, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table: a line a case, over all its tests."""
    rows: dict[str, list[pytest.TestReport]] = {}
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if "faults" in getattr(report, "keywords", {}) and "tests/faults/" in report.nodeid:
                names = [value for key, value in report.user_properties if key == _CASE]
                rows.setdefault(names[-1] if names else report.nodeid.partition("::")[2], []).append(report)
    title = f"fault drills, interval {INTERVAL}"
    if _SEED in config.stash:
        title += f", --faults-seed={config.stash[_SEED]}"
    write_table(terminalreporter, title, _HEADINGS, [_row(case, reports) for case, reports in rows.items()])


def _row(case: str, reports: list[pytest.TestReport]) -> tuple[str, ...]:
    properties = [pair for report in reports for pair in report.user_properties]
    losses = [Loss(*value) for key, value in properties if key == _LOSS]
    failure, recovery = (
        [value for key, value in properties if key == kind] for kind in (_FAILURE, _RECOVERY)
    )
    again = [loss.again for loss in losses]
    return (
        case,
        str(len(losses)),
        f"{statistics.mean(again):.1f}, at most {max(again)}" if again else "-",
        str(max(0, *(loss.beyond for loss in losses))) if losses else "-",
        *(f"{statistics.median(s):.1f}, at most {max(s):.1f}" if s else "-" for s in (failure, recovery)),
        verdict(reports),
    )
