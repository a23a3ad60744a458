"""The ranks of one node as their agent sees them, and what their ends mean."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from mf_train.errors import UserError
from mf_train.launch.logs import Ending

DONE, FAILED, MISTAKE, STOPPED = 0, 1, 2, 75
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FORWARDED = (*STOP_SIGNALS, signal.SIGINT)
# Seconds that the other ranks have to end after one has ended with 0; after one has saved and stopped on request; after
# one was stopped before it listened, so that nobody has anything to save.
_AFTER_DONE_SECONDS = 600.0
_AFTER_STOP_SECONDS = 300.0
_AFTER_EARLY_STOP_SECONDS = 2.0
# Enough for the store of thousands of ranks; no more, as some programs walk through all they may have.
_OPEN_FILES = 65536


@dataclass(frozen=True)
class Node:
    """Which node of the step this is, how many ranks it has, and where the agents meet."""

    number: int
    nodes: int
    per_node: int
    master_address: str
    master_port: int


@dataclass
class Ranks:
    """The ranks of this node; changed under `lock` once they run, as a thread hands signals on to them."""

    host: str
    grace: float  # seconds that ranks have to end after another has failed
    pids: dict[int, int] = field(default_factory=dict)  # by rank, of those that have not ended
    endings: list[Ending] = field(default_factory=list)
    starting: bool = False  # or started
    stop: signal.Signals | None = None  # the last request from outside
    lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, number: int) -> None:
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def stopped_early(self, ending: Ending) -> bool:
        """Whether a request to stop ended this rank by itself: it did not listen yet, and had nothing to save."""
        return self.stop is not None and ending.status - 128 in STOP_SIGNALS

    def failed(self, ending: Ending) -> bool:
        stopped = ending.status in (DONE, STOPPED) or self.stopped_early(ending)
        return not stopped and not ending.by_agent

    def patience_after(self, ending: Ending) -> float:
        """Seconds that the other ranks have to end after this one did."""
        if self.stopped_early(ending):
            return min(self.grace, _AFTER_EARLY_STOP_SECONDS)
        return {DONE: _AFTER_DONE_SECONDS, STOPPED: _AFTER_STOP_SECONDS}.get(ending.status, self.grace)

    def status(self) -> int:
        """Of all ranks of this node, once they have ended: 0, 75 where nothing but stops on request happened, else the
        status of the first failure. Ranks that the agent had to end, though no other had failed here: 1.
        """
        failures = [ending for ending in self.endings if self.failed(ending)]
        if failures:  # of those seen at once, a mistake explains the others
            return min(failures, key=lambda ending: (ending.time, ending.status != MISTAKE)).status
        stops = [ending for ending in self.endings if ending.status != DONE and not ending.by_agent]
        if stops:
            return STOPPED
        return FAILED if any(ending.by_agent for ending in self.endings) else DONE


def find_node(environment: Mapping[str, str], per_node: int) -> Node:
    """Read srun's variables and the master's address. Raises UserError where one is missing."""
    values = {
        name: environment.get(name, "") for name in ("SLURM_NODEID", "SLURM_STEP_NUM_NODES", "MASTER_PORT")
    }
    values = {**values, "MASTER_ADDR": environment.get("MASTER_ADDR", "")}
    for name, value in values.items():
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise UserError(
                f"environment: {name} is {repr(value) if value else 'missing'}: start with srun in a job whose script "
                "sets MASTER_ADDR and MASTER_PORT, or by hand on one node with SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1 "
                "MASTER_ADDR=127.0.0.1 MASTER_PORT=29500"
            )
    if per_node < 1:
        raise UserError(f"PER_NODE is {per_node}: expected at least 1 process a node")
    number, nodes = int(values["SLURM_NODEID"]), int(values["SLURM_STEP_NUM_NODES"])
    return Node(number, nodes, per_node, values["MASTER_ADDR"], int(values["MASTER_PORT"]))


def raise_open_files() -> None:
    """Raise this process's limit of open files as far as it may: often 1024, handed on from the shell that submitted.

    The store takes two connections a rank, NCCL several for each peer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
