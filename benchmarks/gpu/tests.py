"""Tests as steps: pytest, with a line of results for every test.

    python -m benchmarks.gpu.tests tests/gpu --results FILE

A test that crashes or hangs costs itself alone: the runner starts this again, and what was begun is left out.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import pytest

from benchmarks.gpu.steps import Steps, leave_if_device_lost, part_arguments

_NOTHING_RAN = (pytest.ExitCode.NO_TESTS_COLLECTED,)


class Recorder:
    """A pytest plugin that makes every test a step; what `record_property` is given becomes its values."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.began = 0.0
        self.found: dict[str, Any] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        left = [item for item in items if item.nodeid not in self.steps.known]
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.steps.known])
        items[:] = left

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.nodeid not in self.steps.known and not report.passed:
            self.steps.end(report.nodeid, 0.0, **{"error" if report.failed else "skipped": _reason(report)})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.steps.begin(nodeid)
        self.began, self.found = time.perf_counter(), {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.found.setdefault("error", f"{report.when}: {_reason(report)}")
        elif report.skipped:
            self.found["skipped"] = _reason(report)
        if report.when == "teardown" and "error" not in self.found and "skipped" not in self.found:
            self.found["values"] = dict(report.user_properties)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.steps.end(nodeid, time.perf_counter() - self.began, **self.found)
        if "error" in self.found:
            leave_if_device_lost()


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """The line that says why: of a skip its reason, of a failure the error's first line."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is not None:
        return str(crash.message).strip().splitlines()[0][:400]
    lines = str(report.longrepr).strip().splitlines()  # of a file that could not be imported
    return next((line[1:].strip() for line in reversed(lines) if line.startswith("E ")), lines[-1])[:400]


def main() -> None:
    parser = part_arguments(__doc__)
    options, pytest_arguments = parser.parse_known_args()
    os.environ["MF_GPU_TESTS"] = (
        "cpu" if options.rehearse else "cuda"
    )  # a missing GPU is an error, not a skip
    quiet = ["-q", "-p", "no:cacheprovider"]
    status = pytest.main([*pytest_arguments, *quiet], plugins=[Recorder(Steps(options.results))])
    went_through = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, *_NOTHING_RAN)
    if status == pytest.ExitCode.INTERRUPTED and options.results.exists():
        sys.exit(0)  # files that could not be collected, each of which is a step with its error
    sys.exit(0 if status in went_through else int(status))


if __name__ == "__main__":
    main()
