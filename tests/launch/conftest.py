"""The cluster that the SLURM tests share, the drills' runs, and the table that sums the drills up."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.cluster import Cluster, running_cluster, why_not
from tests.launch.drills import INTERVAL, NODES, STEPS, Run, drill_config
from tests.tables import verdict, write_table
from tests.training.runs import write_text

MakeRun = Callable[..., Run]

_CASE, _LOST, _RECOVERY = (f"slurm drill: {what}" for what in ("case", "lost", "recovery"))
_HEADINGS = ("case", "seconds", "steps lost", "allowed", "event to first new step, s", "verdict")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--starter", default="torchrun", help="of the drills' ranks: torchrun (default) or srun")


def starter_of(config: pytest.Config) -> str:
    starter: str = config.getoption(
        "--starter", "torchrun"
    )  # no option where only other folders' tests are named
    return starter


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    """One SLURM cluster for all tests of the session. Skips where none can run."""
    if reason := why_not():
        pytest.skip(reason)
    # short: it holds a socket, whose path may have 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        with running_cluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def slurm_cluster(session_cluster: Cluster) -> Cluster:
    """A SLURM cluster without jobs, all nodes idle: n1 to n4 in main and urgent, g1 and g2 in gpu."""
    session_cluster.restore()
    return session_cluster


class Drill:
    """A test's row in the table, and the clock of its event."""

    def __init__(self, record: Callable[[str, Any], None], case: str) -> None:
        self._record = record
        record(_CASE, case)

    def lost(self, run: Run, allowed: int, restarts: int = 1) -> None:
        """The run has been started again so many times, and each time at most `allowed` steps were done again."""
        lost = run.lost_steps()
        assert len(lost) == restarts, f"{len(lost)} starts went on, not {restarts}\n{run.output()}"
        self._record(_LOST, (max(lost), allowed))
        assert max(lost) <= allowed, f"steps lost: {lost}; allowed are {allowed}\n{run.output()}"

    def recovered(self, run: Run, event: float, timeout: float, after: int = 1) -> None:
        """Waits for the first step of a start after the first `after` ones; `event` is when things went wrong."""
        run.wait_for_steps(1, timeout, after)
        self._record(_RECOVERY, time.monotonic() - event)


@pytest.fixture
def drill(record_property: Callable[[str, Any], None], request: pytest.FixtureRequest) -> Drill:
    """The test's row; its name is the test's docstring, and what tells its parameters apart."""
    name = (request.function.__doc__ or request.node.name).splitlines()[0].rstrip(".:")
    parameters = request.node.name.partition("[")[2].rstrip("]")
    return Drill(record_property, f"{name} ({parameters})" if parameters else name)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=400)


@pytest.fixture(scope="session")
def reference(
    session_cluster: Cluster,
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    pytestconfig: pytest.Config,
) -> Callable[..., Run]:
    """`reference(steps=, nodes=)`: that run, launched and undisturbed, made once."""
    made: dict[tuple[int, int], Run] = {}

    def make(steps: int = STEPS, nodes: int = NODES) -> Run:
        if (steps, nodes) not in made:
            session_cluster.restore()
            folder = tmp_path_factory.mktemp(f"reference-{steps}-{nodes}") / "run"
            run = Run(session_cluster, drill_config(folder, text, steps), starter_of(pytestconfig))
            run.launch(nodes=nodes)
            run.finish(60 + steps)
            made[steps, nodes] = run
        return made[steps, nodes]

    return make


@pytest.fixture
def make_run(slurm_cluster: Cluster, text: Path, tmp_path: Path, pytestconfig: pytest.Config) -> MakeRun:
    """`make_run(steps=, name=, section={key: value})`: a run's configuration, not launched yet."""

    def make(steps: int = STEPS, name: str = "run", **sections: dict[str, Any]) -> Run:
        tree = drill_config(tmp_path / name, text, steps)
        for section, values in sections.items():
            tree[section] = tree.get(section, {}) | values
        return Run(slurm_cluster, tree, starter_of(pytestconfig))

    return make


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table: a line a drill."""
    rows = []
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", []))
            if _CASE in properties and (report.when == "call" or not report.passed):
                rows.append(_row(report, properties))
    write_table(terminalreporter, f"SLURM drills, interval {INTERVAL}", _HEADINGS, rows)


def _row(report: pytest.TestReport, properties: dict[str, Any]) -> tuple[str, ...]:
    lost, allowed = map(str, properties.get(_LOST, ("-", "-")))
    recovery = f"{properties[_RECOVERY]:.1f}" if _RECOVERY in properties else "-"
    return (properties[_CASE], f"{report.duration:.1f}", lost, allowed, recovery, verdict([report]))
