"""torchrun's agent with another idea of what to do when a rank ends. The only file with torch.distributed.elastic."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from mf_train.launch.logs import Ending, format_ending, say
from mf_train.launch.node import DONE, Node, Ranks
from mf_train.launch.peers import Peers, Trouble

_POLL_SECONDS = 0.1
_KILL_SECONDS = 30.0  # after which a killed rank counts as stuck in the kernel
_TELL_SECONDS = 3.0
_NAMED_RANKS = 4  # in the job's output


def make_agent(node: Node, ranks: Ranks, worker: list[str], errors: int, meet: float) -> NodeAgent:
    """An agent that starts `worker` once for each rank, after it met those of the other nodes within `meet` seconds.

    What went wrong first is said on the descriptor `errors`.
    """
    meeting = StaticTCPRendezvous(
        node.master_address, node.master_port, node.number, node.nodes, "memoryformer", math.ceil(meet)
    )
    spec = WorkerSpec(
        role="rank",
        local_world_size=node.per_node,
        rdzv_handler=meeting,
        entrypoint=worker[0],
        args=tuple(worker[1:]),
        max_restarts=0,
        monitor_interval=_POLL_SECONDS,
        master_addr=node.master_address,
        master_port=node.master_port,
    )
    return NodeAgent(spec, node, ranks, errors)


class NodeAgent(LocalElasticAgent):
    """`run` starts the ranks and returns when all have ended, after those left behind were ended."""

    def __init__(self, spec: WorkerSpec, node: Node, ranks: Ranks, errors: int) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self.peers: Peers | None = None
        self._node, self._ranks, self._errors = node, ranks, errors
        self._deadline: float | None = None  # when ranks that are left are killed
        self._pressed = self._killed = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        ranks = self._ranks
        with ranks.lock:
            ranks.starting = True
        assert worker_group.store is not None
        self.peers = Peers(worker_group.store, self._node.number, self._node.nodes, ranks.grace)
        pids: dict[int, Any] = super()._start_workers(worker_group)
        with ranks.lock:
            ranks.pids = {worker.global_rank: pids[worker.local_rank] for worker in worker_group.workers}
            if ranks.stop is not None:
                ranks.send(ranks.stop)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Called every 0.1 s."""
        ended = self._look()
        failures = [ending for ending in ended if self._ranks.failed(ending)]
        for ending in ended:
            say(2, format_ending(ending))
            self._give(self._ranks.patience_after(ending), press=ending.status != DONE)
        assert self.peers is not None
        if failures or (ended and self._pressed and self.peers.trouble is None):
            self._tell(failures, self._ranks.patience_after((failures or ended)[0]))
        if self.peers.trouble is not None and not self._pressed:
            say(2, f"ending the ranks of {self._ranks.host}: {self.peers.trouble.what}")
            self._give(self.peers.trouble.patience, press=True)
        self._kill_late_ranks()
        if not self._ranks.pids:
            # whatever their statuses: the way out of torchrun's loop that waits for nobody
            return RunResult(state=WorkerState.FAILED)
        return RunResult(state=WorkerState.HEALTHY)

    def _look(self) -> list[Ending]:
        """Endings since the last look; the processes are left for torchrun to collect."""
        ranks, ended = self._ranks, []
        with ranks.lock:
            for rank, pid in list(ranks.pids.items()):
                end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if end is not None:
                    del ranks.pids[rank]
                    killed = end.si_code != os.CLD_EXITED
                    ended.append(self._ending(rank, end.si_status, killed))
            ranks.endings += ended
        return ended

    def _ending(self, rank: int, number: int, killed: bool) -> Ending:
        status = 128 + number if killed else number
        ours = killed and (
            (self._killed and number == signal.SIGKILL) or (self._pressed and number == signal.SIGTERM)
        )
        note = "out of memory?" if killed and number == signal.SIGKILL and not ours else ""
        return Ending(rank, self._ranks.host, status, time.time(), ours, note)

    def _give(self, seconds: float, press: bool) -> None:
        """Ranks that are left have so many seconds from now; with `press` they are told."""
        deadline = time.monotonic() + seconds
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)
        if press and not self._pressed:
            self._pressed = True
            with self._ranks.lock:
                self._ranks.send(signal.SIGTERM)

    def _tell(self, failures: list[Ending], patience: float) -> None:
        """Tell the other nodes, and the job's output where this node is the first."""
        assert self.peers is not None
        what = f"ranks of {self._ranks.host} have ended"
        if failures:
            what = "; ".join(format_ending(ending) for ending in failures[:_NAMED_RANKS])
        if self.peers.tell(Trouble(what, patience, bool(failures)), _TELL_SECONDS):
            for ending in failures[:_NAMED_RANKS]:
                if ending.rank != 0 or ending.status > 128:  # rank 0's own words are in the job's output
                    say(self._errors, f"memoryformer: {format_ending(ending)}")

    def _kill_late_ranks(self) -> None:
        now, ranks = time.monotonic(), self._ranks
        if self._deadline is None or now < self._deadline or not ranks.pids:
            return
        with ranks.lock:
            names = ", ".join(map(str, sorted(ranks.pids)))
            if not self._killed:
                say(2, f"killing ranks of {ranks.host} that have not ended in time: {names}")
                self._killed, self._deadline = True, now + _KILL_SECONDS
                ranks.send(signal.SIGKILL)
                return
            say(
                self._errors,
                f"memoryformer: ranks on {ranks.host} are stuck in the kernel and cannot be killed: {names}",
            )
            late = [
                Ending(rank, ranks.host, 128 + signal.SIGKILL, time.time(), by_agent=True)
                for rank in ranks.pids
            ]
            ranks.endings += late
            ranks.pids.clear()
