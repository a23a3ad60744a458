"""A run launched on the test cluster: its starts, the moments to strike at, and what must hold at its end."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mf_train.checkpoint.verify import verify
from mf_train.launch.options import TASK
from tests.faults.drill import check_checkpoint, list_steps, newest_step, partials, step_of_partial
from tests.launch.cluster import FINISHED, Cluster
from tests.training.runs import REPOSITORY, environment, read_metrics, small_config

NODES, PER_NODE, INTERVAL, STEPS = 2, 2, 4, 16
START_SECONDS = 120  # that four trainers may take to their first step on a busy machine
SEEN_SECONDS = 60  # until SLURM has noticed a node that is gone, and given its job another
_STEP = re.compile(r"^step (\d+)/\d+  loss ", re.MULTILINE)
_HEAD = re.compile(r"^rank \d+ on (\S+) started at \S+: pid (\d+),", re.MULTILINE)
_SAME = ("loss", "grad_norm", "learning_rate", "batch_digest", "tokens")


def drill_config(folder: Path, text: Path, steps: int = STEPS) -> dict[str, Any]:
    """Two tensor-parallel ranks inside a node, data-parallel across; a step takes some tenths of a second."""
    tree = small_config(folder, text)
    tree["model"] |= {"hidden_size": 64, "bits": 8}
    tree["training"] |= {"steps": steps, "global_batch_size": 16, "micro_batch_size": 2}
    tree["parallel"] = {"tensor": 2}
    tree["checkpoint"] = {"interval": INTERVAL, "keep": 0, "asynchronous": False}
    return tree


class Rank(NamedTuple):
    """A rank's process: the node it is on, and its number there."""

    node: str
    pid: int


@dataclass(frozen=True)
class Start:
    """A start of a job, from the line that the job script wrote when it began (or ended)."""

    job: str
    number: int
    event: str  # started | ended
    nodes: str
    processes: int
    checkpoint: str
    status: str
    what_next: str


class Run:
    """A run's folder and the configuration that is launched, beside it."""

    def __init__(self, cluster: Cluster, tree: dict[str, Any], starter: str) -> None:
        self.cluster = cluster
        self.starter = starter
        self.folder = Path(tree["training"]["output_dir"])
        self.checkpoints = self.folder / "checkpoints"
        self.interval: int = tree["checkpoint"]["interval"]
        # one file, also for an array: "{task}" in a configuration's name would name one for each task
        self.config = self.folder.parent / f"{self.folder.name.replace(TASK, 'array')}.yaml"
        self.config.write_text(yaml.safe_dump(tree))
        self.job = 0  # the newest

    def launch(self, *options: str, nodes: int = NODES, per_node: int = PER_NODE) -> int:
        """`memoryformer launch` of it, as a user types it; returns the job's number."""
        size = [f"--nodes={nodes}", f"--tasks-per-node={per_node}", f"--starter={self.starter}"]
        done = self.memoryformer("launch", str(self.config), *size, "--parsable", *options)
        assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}{done.stderr}"
        self.job = int(done.stdout)
        return self.job

    def memoryformer(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command on the login node, which is this machine. Its environment is the job's."""
        slurm = {"SLURM_CONF": self.cluster.environment["SLURM_CONF"]}
        return subprocess.run(
            [sys.executable, "-m", "mf_train", *arguments],
            env={**environment(), **slurm},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )

    # what it shows

    def output(self) -> str:
        """What the jobs wrote, and how SLURM sees the newest: for the message of a failed assertion."""
        paths = sorted((self.folder / "launch" / "logs").glob("*.out"))
        text = "".join(f"-- {path.name}\n{path.read_text(errors='replace')[-6000:]}" for path in paths)
        job = self.cluster.job(self.job) if self.job else {}
        shown = {key: job.get(key) for key in ("JobState", "Reason", "Restarts", "NodeList", "ExitCode")}
        return f"{text}-- {shown}\n{self.cluster.run('sinfo', '--Node', '--noheader')}"

    def notes(self) -> list[Start]:
        """The lines of starts.tsv."""
        path = self.folder / "launch" / "starts.tsv"
        rows = [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []
        return [
            Start(job, int(number), event, nodes, int(processes), checkpoint, status, what_next)
            for _, job, number, event, nodes, processes, checkpoint, status, what_next in rows
        ]

    def starts(self) -> list[Start]:
        """Those that have begun."""
        return [note for note in self.notes() if note.event == "started"]

    def logs(self, start: Start) -> Path:
        return self.folder / "launch" / "logs" / f"{start.job}-{start.number}"

    def rank_log(self, start: Start, rank: int = 0) -> str:
        path = self.logs(start) / f"rank-{rank:05d}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self, start: Start) -> list[int]:
        """Steps that a start has done, as its rank 0 says."""
        return [int(number) for number in _STEP.findall(self.rank_log(start))]

    def rank(self, rank: int) -> Rank:
        """The process of a rank of the newest start."""
        found = _HEAD.findall(self.rank_log(self.starts()[-1], rank))
        assert found, f"rank {rank} has not started\n{self.output()}"
        return Rank(found[-1][0], int(found[-1][1]))

    def signal(self, rank: Rank, signal: str) -> None:
        self.cluster.run_on(rank.node, "kill", f"-{signal}", str(rank.pid))

    # waiting for it

    def wait_until(self, happened: Callable[[], bool], what: str, timeout: float, poll: float = 0.01) -> None:
        """Raises AssertionError with what the jobs wrote where it takes too long, or the job ends before."""
        deadline = time.monotonic() + timeout
        look = time.monotonic() + 2
        while not happened():
            now = time.monotonic()
            assert now < deadline, f"no {what} after {timeout:g} s\n{self.output()}"
            if now > look:
                ended = self.cluster.job(self.job)["JobState"] in FINISHED
                assert not ended or happened(), f"the job ended before {what}\n{self.output()}"
                look = now + 2
            time.sleep(poll)

    def wait_for_steps(self, steps: int, timeout: float = START_SECONDS, after: int = 0) -> Start:
        """Waits until one of the starts after the first `after` ones has done so many steps; returns it."""

        def found() -> Start | None:
            new = [start for start in self.starts()[after:] if len(self.steps(start)) >= steps]
            return new[-1] if new else None

        self.wait_until(lambda: found() is not None, f"{steps} steps of start {after + 1} or later", timeout)
        start = found()
        assert start is not None
        return start

    def wait_for_save(self, step: int, timeout: float = START_SECONDS) -> None:
        """Waits until the save of a step, or a later one, is under way."""

        def saving() -> bool:
            assert newest_step(self.checkpoints) < step, "the save ended before it was seen"
            return any(step_of_partial(path) >= step for path in partials(self.checkpoints))

        self.wait_until(saving, f"save of step {step}", timeout, poll=0.0005)

    def end(self, timeout: float = 180) -> dict[str, str]:
        """Waits until the newest job has finished for good; returns what SLURM says of it."""
        try:
            return self.cluster.wait_for_end(self.job, timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None

    def finish(self, timeout: float = 180) -> dict[str, str]:
        """Waits for an end with status 0."""
        job = self.end(timeout)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.output()
        return job

    # what must hold

    def lost_steps(self) -> list[int]:
        """Between each start that did steps and the next one that did: steps that were done again."""
        done = [steps for start in self.starts() if (steps := self.steps(start))]
        return [before[-1] - (after[0] - 1) for before, after in itertools.pairwise(done)]

    def check_folder(self) -> None:
        """Every checkpoint is complete, and `latest` names one."""
        for step in list_steps(self.checkpoints):
            check_checkpoint(self.checkpoints / f"step-{step:09d}")
        latest = (self.checkpoints / "latest").read_text().strip()
        assert (self.checkpoints / latest / "manifest.json").exists(), latest
        assert len(list(verify(self.folder))) == len(list_steps(self.checkpoints))

    def check_end(self, reference: Run, relative: float = 0.0) -> None:
        """It ended as the undisturbed one: each step once, the same batches, losses and norms, its checkpoints whole.

        `relative`: how far losses and norms may differ, where the number of nodes was not always the same.
        """
        ours, theirs = read_metrics(self.folder), read_metrics(reference.folder)
        assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs]
        for mine, expected in zip(ours, theirs, strict=True):
            for key in _SAME:
                if relative and key in ("loss", "grad_norm"):
                    same = math.isclose(mine[key], expected[key], rel_tol=relative)
                else:
                    same = mine[key] == expected[key]
                assert same, f"step {mine['step']}: {key} {mine[key]} instead of {expected[key]}"
        self.check_folder()
        assert newest_step(self.checkpoints) == newest_step(reference.checkpoints)
        names = [path.name for path in self.checkpoints.iterdir()]
        left = [name for name in names if not re.fullmatch(r"latest|\.writer|step-\d{9}", name)]
        assert not left, f"left behind: {left}"


def same_files(folder: Path) -> dict[Path, tuple[int, int]]:
    """When each file of a run was last changed, and its size; the logs apart."""
    paths = [path for path in folder.rglob("*") if path.is_file() and "launch" not in path.parts]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}
