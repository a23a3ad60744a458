"""What the agents of several nodes tell each other, through a real store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from mf_train.launch.peers import Outcome, Peers, Trouble, combine


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [
        ([], 0),
        ([Outcome(0), Outcome(0)], 0),
        ([Outcome(0), Outcome(75)], 75),
        ([Outcome(1, 2), Outcome(137, 1), Outcome(75)], 137),
        ([Outcome(1, 2), Outcome(1), Outcome(2, 1)], 2),
        ([Outcome(1), Outcome(75)], 75),  # ended by its agent as others had saved and stopped
        ([Outcome(1), Outcome(0)], 1),
    ],
)
def test_the_status_of_all_nodes(outcomes: list[Outcome], status: int) -> None:
    assert combine(outcomes) == status


def meet(nodes: int) -> list[Peers]:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    stores = [server] + [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(nodes - 1)]
    return [Peers(store, node, nodes, grace=1.0) for node, store in enumerate(stores)]


def settle(peers: list[Peers], statuses: list[int]) -> list[int]:
    """What all get, where each tells its status at once."""
    results = [-1] * len(peers)

    def ask(node: int) -> None:
        results[node] = peers[node].settle(statuses[node])

    threads = [threading.Thread(target=ask, args=[node], daemon=True) for node in range(len(peers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    return results


def test_the_first_failure_is_everybody_s() -> None:
    peers = meet(3)
    assert peers[2].tell(Trouble("rank 5 broke", 7.0, True), seconds=10)
    assert not peers[1].tell(Trouble("rank 3 lost it", 8.0, True), seconds=10)
    deadline = time.monotonic() + 10
    while peers[0].trouble is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert peers[0].trouble == Trouble("rank 5 broke", 7.0, True)
    assert settle(peers, [1, 1, 139]) == [139, 139, 139]


def test_a_stop_is_no_failure() -> None:
    peers = meet(2)
    peers[0].tell(Trouble("ranks have ended", 300.0, False), seconds=10)
    assert peers[1].tell(Trouble("rank 1 broke", 7.0, True), seconds=10)
    assert settle(peers, [75, 1]) == [1, 1]


@pytest.mark.slow
def test_nodes_that_give_no_sign_are_not_waited_for() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
    assert settle([Peers(store, 0, 3, grace=1.0)], [75]) == [75]
