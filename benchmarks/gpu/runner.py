"""Runs parts one after the other: a part that fails, hangs or crashes takes nothing from the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu.parts import Part
from benchmarks.gpu.steps import DEVICE_LOST, Line, Steps
from mf_train.run_folder import read_records

REPOSITORY = Path(__file__).resolve().parents[2]
_POLL_SECONDS = 0.1
_STACKS_SECONDS = 1.0  # for a process to print where it stands
_KILL_SECONDS = 10.0  # a process that a kill does not end within these waits for a device that hangs
_LAST_WORDS = 4000  # bytes of output in which the reason of a failure is looked for


@dataclass
class PartResult:
    """What became of one part."""

    name: str
    reason: str = (
        ""  # why it was not run, or what ended it before its last step; "" for a part that went through
    )
    seconds: float = 0.0
    starts: int = 0
    steps: list[Line] = field(default_factory=list)  # one a step, as `Steps` writes them

    @property
    def failed(self) -> bool:
        return bool(self.reason) or any("error" in step for step in self.steps)

    def to_tree(self) -> dict[str, Any]:
        return asdict(self) | {"failed": self.failed}


class Runner:
    """Runs parts until a moment at which everything has to be over.

    folder: where each part's results and `output.log`, what all of them printed, are written.
    arguments: options that every part gets. environment: variables on top of this process's.
    device_answers: called after a part or step ended badly; where it gives False, no further part is started.
    """

    def __init__(
        self,
        folder: Path,
        end: float,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        device_answers: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self.end = end  # as time.monotonic() says
        self.arguments = list(arguments)
        self.environment = {**os.environ, **(environment or {})}
        self.device_answers = device_answers
        self.lost = ""  # why nothing more can run
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, part: Part) -> PartResult:
        """Run one part to its end or its limit. Never raises for what the part does."""
        outcome = PartResult(part.name)
        if missing := part.missing():
            outcome.reason = (
                f"not run: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
            )
        elif self.lost:
            outcome.reason = f"not run: {self.lost}"
        elif self.end - time.monotonic() < min(5, part.seconds):
            outcome.reason = f"not run: no time was left; --only {part.name} runs it alone"
        if outcome.reason:
            return outcome
        began = time.monotonic()
        end = min(began + part.limit, self.end)
        results = self.folder / f".{part.name}.jsonl"
        results.unlink(missing_ok=True)
        with (self.folder / "output.log").open("ab") as log:
            while True:
                known = len(read_records(results))
                outcome.starts += 1
                ending = self._run_once(part, results, log, end)
                outcome.steps = _settle(results, ending)
                if not ending:
                    break
                _note(log, f"{part.name}: {ending}")
                got_on = len(read_records(results)) > known
                if self.lost:
                    outcome.reason = self.lost
                elif not self.device_answers():
                    self.lost = f"the device did not answer after part {part.name}"
                    outcome.reason = f"{ending}; then the device did not answer"
                elif time.monotonic() >= end:
                    outcome.reason = f"ended at its limit of {end - began:.0f} s, with steps left"
                elif not got_on:
                    outcome.reason = ending
                if outcome.reason:
                    break
        results.unlink(missing_ok=True)
        outcome.seconds = time.monotonic() - began
        return outcome

    def stop(self) -> None:
        """End the part that runs, from a signal handler."""
        self.end = 0.0
        self.lost = "stopped by a signal"

    def _run_once(self, part: Part, results: Path, log: IO[bytes], end: float) -> str:
        """One process of a part; says why it ended early, or "" where it went through."""
        command = [sys.executable, "-m", part.module, *part.arguments]
        command += ["--results", str(results), "--folder", str(self.folder), *self.arguments]
        _note(log, " ".join(command))
        from_here = log.tell()
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # what it starts is ended with it
        )
        ending = self._wait(self.process, part, results, end)
        if ending is not None:
            ending = self._end_process(self.process) or ending
        elif self.process.returncode == DEVICE_LOST:
            ending = "an error of CUDA, after which its process could not go on"
        elif self.process.returncode < 0:
            ending = f"crashed ({signal.Signals(-self.process.returncode).name})"
        elif self.process.returncode:
            ending = f"ended with status {self.process.returncode}: {_last_line(log.name, from_here)}"
        self._end_group(self.process.pid)
        return ending or ""

    def _wait(self, process: subprocess.Popen[bytes], part: Part, results: Path, end: float) -> str | None:
        """Wait for the process; a reason to end it, or None where it ended by itself."""
        size, changed = -1, time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if (found := results.stat().st_size if results.exists() else 0) != size:
                size, changed = found, now
            if now >= min(end, self.end):
                return self.lost or "stopped at its part's limit"
            if now - changed > part.step_limit:
                return f"hung: nothing for {part.step_limit} s"
            time.sleep(_POLL_SECONDS)
        return None

    def _end_process(self, process: subprocess.Popen[bytes]) -> str:
        """Have the process print its stacks and kill it; says so where that does not end it."""
        process.send_signal(signal.SIGUSR1)
        try:
            process.wait(_STACKS_SECONDS)
        except subprocess.TimeoutExpired:
            self._end_group(process.pid)
        try:
            process.wait(_KILL_SECONDS)
        except subprocess.TimeoutExpired:
            return "hung, and a kill did not end it"
        return ""

    @staticmethod
    def _end_group(group: int) -> None:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # nothing of it is left


def _settle(results: Path, ending: str) -> list[Line]:
    """The last line of each step; one that began and did not end gets its process's ending as its error."""
    found: dict[str, Line] = {}
    for line in read_records(results):
        found[line["step"]] = line
    for name, line in found.items():
        if "began" in line:
            seconds = time.time() - line["began"]
            Steps(results).end(name, seconds, error=ending or "its process ended within it")
            found[name] = read_records(results)[-1]
    return list(found.values())


def _note(log: IO[bytes], text: str) -> None:
    log.write(f"\n== {text}\n".encode())
    log.flush()


def _last_line(log: str, start: int) -> str:
    with Path(log).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(start, size - _LAST_WORDS))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "it printed nothing"
