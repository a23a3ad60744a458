"""A real run that faults strike: its starts, the moments to strike at, and what must hold after each fault."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mf_train.checkpoint.verify import verify
from tests.training.runs import REPOSITORY, command_line, environment, read_metrics, small_config

INTERVAL, KEEP = 2, 3
PATIENCE = 600.0  # seconds that a start may take on a busy machine
_MARK = "MEMORYFORMER_DRILL"  # in the environment of everything that a start starts
_SAME = ("loss", "grad_norm", "learning_rate", "batch_digest", "tokens")


def drill_config(folder: Path, steps: int, text: Path) -> dict[str, Any]:
    """A run on the JSONL file `text` whose saves (32 MB) take about as long as a step."""
    tree = small_config(folder, text)
    tree["model"] |= {"hidden_size": 64, "bits": 8}
    tree["training"] |= {"steps": steps, "micro_batch_size": 4}
    tree["checkpoint"] = {"interval": INTERVAL, "keep": KEEP}
    return tree


class Run:
    """A run's folder and the command that starts it, always the same; `reference` is the same run undisturbed.

    The configuration and what its starts print go to the folder `logs`.
    """

    def __init__(
        self, tree: dict[str, Any], logs: Path, processes: int = 1, reference: Run | None = None
    ) -> None:
        self.folder = Path(tree["training"]["output_dir"])
        self.checkpoints = self.folder / "checkpoints"
        self.processes = processes
        self.reference = reference
        self.text = Path(tree["data"]["train"][0]["path"])
        self.interval: int = tree["checkpoint"]["interval"]
        self.logs = logs
        self.starts: list[Start] = []
        self.config = logs / "run.yaml"
        self.config.write_text(yaml.safe_dump(tree))

    def start(self, script: Sequence[str] = ("-m", "mf_train")) -> Start:
        """Start it once; `script` stands in for `-m mf_train` where a test needs a hook."""
        self.starts.append(Start(self, script))
        return self.starts[-1]

    def finish(self) -> float:
        """Start it again and let it come to the reference's end; returns the seconds to the first step."""
        start = self.start()
        seconds = start.wait_for_step(1)
        status = start.end()
        assert status == 0, f"status {status}\n{start.text()}"
        self.check_end()
        return seconds

    def check_folder(self, *, saving: bool = False) -> Loss:
        """What must hold whatever has just happened: every checkpoint listed is complete, and `latest` names one.

        Returns what was lost. A save that had not ended (`saving`, or its folder is still there) is not counted on:
        then the interval before it may be lost, too.
        """
        listed = list_steps(self.checkpoints)
        for step in listed:
            check_checkpoint(self.checkpoints / name_of(step))
        latest = self.checkpoints / "latest"
        if latest.exists():
            assert int(latest.read_text().strip().removeprefix("step-")) in listed, (
                latest.read_text(),
                listed,
            )
        last, newest = self.last_step(), max(listed, default=0)
        assert newest <= last, f"checkpoint of step {newest}, and metrics up to step {last}"
        saving = saving or any(step_of_partial(path) > newest for path in partials(self.checkpoints))
        return Loss(last - newest, last - newest - (2 if saving else 1) * self.interval)

    def last_step(self) -> int:
        """The last step recorded in metrics.jsonl, whose last line may be torn."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def check_end(self) -> None:
        """It has ended as the undisturbed one: each step once, the same losses and digests, the same files, no more."""
        assert self.reference is not None
        ours, theirs = read_metrics(self.folder), read_metrics(self.reference.folder)
        assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
        for mine, expected in zip(ours, theirs, strict=True):
            for key in _SAME:
                assert mine[key] == expected[key], f"step {mine['step']}: {key}"
        self.check_folder()
        ends = [run.checkpoints / name_of(newest_step(run.checkpoints)) for run in (self, self.reference)]
        assert ends[0].name == ends[1].name
        names = [sorted(path.name for path in end.glob("*.safetensors")) for end in ends]
        assert names[0] == names[1] and len(names[0]) >= 4
        for name in names[0]:
            assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name
        states = [json.loads((end / "state.json").read_text()) for end in ends]
        assert states[0]["stream"] == states[1]["stream"]
        assert len(list(verify(self.folder))) == len(list_steps(self.checkpoints))
        names = [path.name for path in self.checkpoints.iterdir()]
        left = [name for name in names if not re.fullmatch(r"latest|\.writer|step-\d{9}(\.damaged)?", name)]
        assert not left, f"left behind: {left}"


@dataclass(frozen=True)
class Loss:
    """Steps that have to be trained again, and how many of them are more than the interval's where that is positive."""

    again: int
    beyond: int


class Start:
    """One start of a run: the launcher, its ranks and all that they start, told by a mark in their environment."""

    def __init__(self, run: Run, script: Sequence[str]) -> None:
        self.run = run
        self.mark = uuid.uuid4().hex
        self.known = {path.name for path in partials(run.checkpoints)}
        self.before = newest_step(run.checkpoints)
        launcher = command_line([], run.processes)[:-2]
        self.output, self.errors = (run.logs / f"{self.mark[:8]}.{kind}" for kind in ("out", "err"))
        self.first_step: float | None = None  # seconds to it, where it was waited for
        self.begun = time.monotonic()
        with self.output.open("w") as output, self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [*launcher, *script, "train", str(run.config)],
                stdout=output,
                stderr=errors,
                env={**environment(), _MARK: self.mark},
                cwd=REPOSITORY,
                start_new_session=True,
            )

    # what it shows

    def text(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in (self.output, self.errors))

    def complaints(self) -> list[str]:
        """The lines that the command itself wrote to standard error."""
        lines = self.errors.read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("memoryformer: ")]

    def steps(self) -> int:
        """Steps that this start has shown."""
        lines = self.output.read_text(errors="replace").splitlines()
        return sum(line.startswith("step ") and "  loss " in line for line in lines)

    def wait_for_step(self, count: int) -> float:
        """Wait until `count` steps are done; returns the seconds that this took since the start."""
        self.wait_until(lambda: self.steps() >= count, f"step number {count} of this start")
        return time.monotonic() - self.begun

    def saving(self) -> bool:
        """Whether a save is under way."""
        return any(path.name not in self.known for path in partials(self.run.checkpoints))

    def wait_until(self, happened: Callable[[], bool], what: str, poll: float = 0.004) -> None:
        """Raises AssertionError with the output where it ends before, or takes too long."""
        while not happened():
            if self.first_step is None and self.steps():
                self.first_step = time.monotonic() - self.begun
            ended = self.process.poll()
            if ended is not None and not happened():
                raise AssertionError(f"ended with {ended} before {what}\n{self.text()}")
            if time.monotonic() - self.begun > PATIENCE:
                self.kill()
                raise AssertionError(f"no {what} within {PATIENCE:.0f} s\n{self.text()}")
            time.sleep(poll)

    def saves(self) -> int:
        """Saves that this start has begun and shows: partial folders, and checkpoints that were not there."""
        begun = {
            step_of_partial(path) for path in partials(self.run.checkpoints) if path.name not in self.known
        }
        done = {step for step in list_steps(self.run.checkpoints) if step > self.before}
        return len(begun | done)

    # what it is made of

    def processes(self) -> list[int]:
        return [pid for pid in _pids() if _environment_of(pid).get(_MARK) == self.mark]

    def ranks(self) -> dict[int, int]:
        """Process of each rank that has been started."""
        if self.run.processes == 1:
            return {0: self.process.pid}
        children = [pid for pid in self.processes() if _parent_of(pid) == self.process.pid]
        environments = {pid: _environment_of(pid) for pid in children}
        return {int(found["RANK"]): pid for pid, found in environments.items() if "RANK" in found}

    # what is done to it

    def send(self, number: signal.Signals, pids: Iterable[int]) -> None:
        for pid in pids:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self) -> None:
        """kill -9 of all of it."""
        while living := self.processes():
            self.send(signal.SIGKILL, living)
            self.process.poll()

    def end(self, patience: float = PATIENCE, left_over: float = 10.0) -> int:
        """The exit status once it has ended; nothing that it started may live on for more than `left_over` seconds."""
        try:
            status = self.process.wait(patience)
        except subprocess.TimeoutExpired:
            text = self.text()
            self.kill()
            raise AssertionError(f"still there after {patience:.0f} s\n{text}") from None
        deadline = time.monotonic() + left_over
        while living := self.processes():
            if time.monotonic() > deadline:
                commands = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in living]
                self.kill()
                raise AssertionError(f"left behind: {commands}\n{self.text()}")
            time.sleep(0.02)
        return status


@dataclass(frozen=True)
class Moment:
    """When to strike a start: `seconds` after it began, or after its `count`-th step, or its `count`-th save began."""

    kind: str  # start | step | saving
    count: int
    seconds: float

    def wait(self, start: Start) -> None:
        if self.kind == "step":
            start.wait_for_step(self.count)
        elif self.kind == "saving":
            start.wait_until(lambda: start.saves() >= self.count, f"save number {self.count}", poll=0.0005)
        time.sleep(self.seconds)

    def __str__(self) -> str:
        after = {"start": "the start", "step": f"step {self.count}", "saving": f"save {self.count}"}[
            self.kind
        ]
        return f"{1000 * self.seconds:.0f} ms after {after}"


def random_moments(generator: random.Random, count: int, start_seconds: float = 6.0) -> list[Moment]:
    """A fifth while starting, two fifths in training, two fifths in a save, and in this order at random."""
    kinds = ["start", "step", "step", "saving", "saving"] * -(-count // 5)
    kinds = kinds[:count]
    generator.shuffle(kinds)
    longest = {"start": start_seconds, "step": 0.25, "saving": 0.25}
    return [Moment(kind, generator.choice((1, 1, 2)), generator.uniform(0, longest[kind])) for kind in kinds]


# what is on disk, read without the product


def name_of(step: int) -> str:
    return f"step-{step:09d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps of the checkpoints that have their final name."""
    names = [path.name.removeprefix("step-") for path in checkpoints.glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def newest_step(checkpoints: Path) -> int:
    return max(list_steps(checkpoints), default=0)


def partials(checkpoints: Path) -> list[Path]:
    """Folders of saves that have not ended."""
    return list(checkpoints.glob(".step-*.partial*"))


def step_of_partial(path: Path) -> int:
    return int(path.name.removeprefix(".step-").split(".")[0])


def check_checkpoint(checkpoint: Path) -> None:
    """Every file that the manifest names, and no other, with its size and CRC-32."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert {path.name for path in checkpoint.iterdir()} == {*files, "manifest.json"}, checkpoint
    for name, record in files.items():
        content = (checkpoint / name).read_bytes()
        assert len(content) == record["size"], checkpoint / name
        assert zlib.crc32(content) == record["crc32"], checkpoint / name


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _environment_of(pid: int) -> dict[str, str]:
    """What a process was started with; nothing for one that has ended or is another user's."""
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition("=") for entry in content.decode(errors="replace").split("\0"))
    return {key: value for key, _, value in pairs}


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])
