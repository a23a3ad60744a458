"""Which rank is slow: each rank's own time a step, which the time of a whole step, the same on all, does not tell.

A rank's own time is its step's time without what it spent in collectives, where it waits for the others. The wait for
its data is in it. Every `logging.ranks_interval` steps one all-gather brings two numbers a rank, the means over the
steps since the last one.
"""

import socket
import time
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist

from mf_train.parallel.collectives import collective, ledger
from mf_train.parallel.exchange import all_gather

SLOW, REPORTS = 1.25, 3  # times the median rank's time, in so many reports one after another


class RankTimes:
    """Measures this rank's steps, and compares the ranks. On all ranks alike; nothing with one rank or interval 0."""

    def __init__(self, interval: int, device: torch.device) -> None:
        self.interval = interval if dist.get_world_size() > 1 else 0
        self.device = device
        self.slow = SlowRank()
        self._began = self._in_collectives = 0.0
        self._sums = [0.0, 0.0]
        self._steps = -1  # the first step, which compiles, does not count

    def begin(self) -> None:
        """A step begins."""
        if self.interval:
            self._began, self._in_collectives = time.perf_counter(), ledger.seconds()

    def end(self, step: int, data_wait: float) -> tuple[dict[str, Any], str]:
        """A step has ended, for which this rank waited `data_wait` seconds for its data.

        Returns on a step that is a multiple of the interval what metrics.jsonl records, and a line to show, or "".
        Collective there.
        """
        if not self.interval:
            return {}, ""
        own = time.perf_counter() - self._began - (ledger.seconds() - self._in_collectives)
        self._steps += 1
        if self._steps:
            self._sums = [self._sums[0] + own, self._sums[1] + data_wait]
        if step % self.interval or not self._steps:
            return {}, ""
        mean = torch.tensor(self._sums, dtype=torch.float64, device=self.device) / self._steps
        self._sums, self._steps = [0.0, 0.0], 0
        every = torch.empty(2 * dist.get_world_size(), dtype=torch.float64, device=self.device)
        with collective("all-gather of the ranks' times", self.device):
            all_gather(every, mean).wait()
        seconds, waits = every.view(-1, 2).T.tolist()
        found = compare(seconds, waits)
        rank = self.slow.look(found)
        if rank is None:
            return found, ""
        host = [socket.gethostname()]
        with collective("the slow rank's host", self.device):
            dist.broadcast_object_list(host, rank, device=self.device)
        return found, (
            f"step {step}: rank {rank} on {host[0]} is slow: {seconds[rank]:.3g} s of its own a step, the median rank "
            f"{found['rank_seconds_median']:.3g} s; it waits {waits[rank]:.3g} s for its data"
        )


def compare(seconds: list[float], waits: list[float]) -> dict[str, Any]:
    """Least, median (the lower one) and most of the ranks' own seconds a step and waits for data, and whose."""
    return {
        "rank_seconds_least": min(seconds),
        "rank_seconds_least_rank": seconds.index(min(seconds)),
        "rank_seconds_median": median_low(seconds),
        "rank_seconds_most": max(seconds),
        "rank_seconds_most_rank": seconds.index(max(seconds)),
        "rank_data_wait_median": median_low(waits),
        "rank_data_wait_most": max(waits),
        "rank_data_wait_most_rank": waits.index(max(waits)),
    }


class SlowRank:
    """Says once of a rank that it is the slowest, and slow, in `REPORTS` reports one after another."""

    def __init__(self) -> None:
        self._rank: int | None = None
        self._times = 0

    def look(self, found: dict[str, Any]) -> int | None:
        """The rank to speak of now."""
        slow = found["rank_seconds_most"] > SLOW * found["rank_seconds_median"]
        rank = found["rank_seconds_most_rank"] if slow else None
        self._times = self._times + 1 if rank == self._rank else 1
        self._rank = rank
        return rank if self._times == REPORTS else None
