"""Tables at the end of pytest's output, for tests whose numbers matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def write_table(
    terminalreporter: Any, title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A section with a line a row, in columns; nothing where there are no rows."""
    if not rows:
        return
    table = [headings, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
    terminalreporter.section(title)
    for row in table:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        terminalreporter.write_line(line.rstrip())


def verdict(reports: Sequence[pytest.TestReport]) -> str:
    """Of the tests of a row: FAILED, ok, or why they were skipped."""
    if any(report.failed for report in reports):
        return "FAILED"
    if any(report.passed for report in reports):
        return "ok"
    assert isinstance(reports[0].longrepr, tuple)
    return f"skipped: {reports[0].longrepr[2].removeprefix('Skipped: ')}"
