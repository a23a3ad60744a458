"""What the agents of a job tell each other: that a node has failed, and the exit status that all of them end with.

By a thread in each, through the store that the agent of node 0 holds for the ranks too. srun ends with the greatest
status of its tasks; so that 75 (saved, start me again) on one node does not hide a failure on another, all agents end
with the same. At N nodes the store serves 2 N small requests in a period, and at the end N more for each of them.
"""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from mf_train.launch.node import DONE, FAILED, STOPPED

if TYPE_CHECKING:
    from torch.distributed import Store

_PERIOD = 0.5
_SILENCE_SECONDS = 15.0  # after which a node that has not told its end counts as gone
_STORE_SECONDS = 60.0  # without an answer, after which node 0 counts as gone
_LAST_WORDS_SECONDS = 5.0  # that node 0 holds the store for others to read the end
_KEY = "mf_train/launch/"


class Outcome(NamedTuple):
    """How the ranks of a node ended: a status, and the place of their first failure among those of all nodes, from 1.

    0 where nothing failed there: ranks that were ended because of another node do not count.
    """

    status: int
    order: int = 0


def combine(outcomes: list[Outcome]) -> int:
    """The status of all: 0, or 75 where nothing but stops on request happened, else that of the first failure."""
    failures = [outcome for outcome in outcomes if outcome.status not in (DONE, STOPPED)]
    first = min(
        (outcome for outcome in failures if outcome.order), key=lambda outcome: outcome.order, default=None
    )
    if first is not None:
        return first.status
    if any(outcome.status == STOPPED for outcome in outcomes):
        return STOPPED
    return FAILED if failures else DONE


class Trouble(NamedTuple):
    """What ended the run on a node: a failure, or a stop on request; the seconds that the other ranks have to end."""

    what: str
    patience: float
    failure: bool


class Peers:
    """The other nodes of the job. `trouble` is what ended the run where it ended first, None before."""

    def __init__(self, store: Store, node: int, nodes: int, grace: float) -> None:
        self.trouble: Trouble | None = None
        self._store, self._node, self._nodes, self._grace = store, node, nodes, grace
        self._untold: list[Trouble] = []
        self._outcome: Outcome | None = None
        self._order = 0  # of this node's first failure
        self._told = threading.Event()
        self._wake = threading.Event()
        self._settled = threading.Event()
        self._status = DONE
        self._answered = time.monotonic()
        threading.Thread(target=self._talk, name="peers", daemon=True).start()

    def tell(self, trouble: Trouble, seconds: float) -> bool:
        """Tell the others that the run has ended here; whether no failure came before, as far as can be known."""
        self._told.clear()
        self._untold.append(trouble)
        self._wake.set()
        return not self._told.wait(seconds) or self._order == 1

    def settle(self, status: int) -> int:
        """Tell how this node's ranks ended and wait until those of the others have; the status that all end with.

        Nodes that have gone do not count. Where the store does not answer, this node's own status.
        """
        self._outcome = Outcome(status)
        self._wake.set()
        while not self._settled.wait(_PERIOD):
            if time.monotonic() - self._answered > _STORE_SECONDS:
                return status
        return self._status

    def _talk(self) -> None:
        try:
            signs = 0
            while self._outcome is None:
                signs += 1
                self._store.set(f"{_KEY}sign/{self._node}", str(signs))
                self._exchange()
                self._wake.wait(_PERIOD)
                self._wake.clear()
            self._exchange()
            self._end(self._outcome._replace(order=self._order))
        except RuntimeError:  # the connection broke
            self.trouble = self.trouble or Trouble("the agent of node 0 has gone", self._grace, True)
            self._told.set()
            while self._outcome is None:
                self._wake.wait(_PERIOD)
            self._status = self._outcome.status
            self._settled.set()

    def _exchange(self) -> None:
        while self._untold:
            trouble = self._untold[0]
            if trouble.failure and not self._order:
                self._order = self._store.add(_KEY + "failures", 1)
            if self._store.add(_KEY + "troubles", 1) == 1:
                self._store.set(_KEY + "trouble", json.dumps(trouble))
            del self._untold[0]
            self._told.set()
        if self.trouble is None and self._store.check([_KEY + "trouble"]):
            self.trouble = Trouble(*json.loads(self._store.get(_KEY + "trouble")))
        self._answered = time.monotonic()

    def _end(self, outcome: Outcome) -> None:
        self._store.set(f"{_KEY}end/{self._node}", json.dumps(outcome))
        if self._node == 0:
            self._status = combine(self._collect())
            self._store.set(_KEY + "status", str(self._status))
        while not self._store.check([_KEY + "status"]):
            time.sleep(_PERIOD / 4)
            self._answered = time.monotonic()
        self._status = int(self._store.get(_KEY + "status"))
        readers = self._store.add(_KEY + "readers", 1)
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while self._node == 0 and readers < self._nodes and time.monotonic() < deadline:
            time.sleep(_PERIOD / 20)
            readers = self._store.add(_KEY + "readers", 0)
        self._settled.set()

    def _collect(self) -> list[Outcome]:
        """The outcomes of all nodes that still answer."""
        outcomes: dict[int, Outcome] = {}
        signs: dict[int, tuple[bytes, float]] = {}
        waiting = set(range(self._nodes))
        while waiting:
            for node in sorted(waiting):
                key = f"{_KEY}end/{node}"
                if self._store.check([key]):
                    outcomes[node] = Outcome(*json.loads(self._store.get(key)))
                    waiting.discard(node)
                elif self._is_silent(node, signs):
                    waiting.discard(node)
            self._answered = time.monotonic()
            time.sleep(_PERIOD / 4 if waiting else 0)
        return list(outcomes.values())

    def _is_silent(self, node: int, signs: dict[int, tuple[bytes, float]]) -> bool:
        key = f"{_KEY}sign/{node}"
        sign = self._store.get(key) if self._store.check([key]) else b""
        now = time.monotonic()
        if node not in signs or signs[node][0] != sign:
            signs[node] = (sign, now)
        return now - signs[node][1] > _SILENCE_SECONDS
