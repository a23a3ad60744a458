"""Python processes for tests of what one process cannot show: limits, kills, what is imported."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training.runs import REPOSITORY, environment


def start_python(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """`python -c CODE ARGUMENTS` with this project; standard output and error into pipes unless `options` say else."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, **{"cwd": REPOSITORY, "env": environment(), "text": True, **pipes, **options}
    )


def result(process: subprocess.Popen[str], status: int = 0) -> str:
    """What a process has printed when it has ended, which must be with this exit status: its errors unless with 0."""
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        out, errors = process.communicate()
        raise AssertionError(f"not ended after 120 s: {out}{errors}") from None
    assert process.returncode == status, out + errors
    return errors if status else out


def run_python(code: str, *arguments: object, status: int = 0) -> str:
    """As `result`, of a process that `start_python` starts."""
    return result(start_python(code, *arguments), status)


def is_running(process: int) -> bool:
    """Whether there is such a process that has not ended; one that nobody has waited for has ended."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    """Wait until `condition()` holds; `what` says what is wrong if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
