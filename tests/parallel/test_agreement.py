"""What goes wrong on any rank ends all of them, and rank 0 says why and where. One start of 3 processes."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest
import torch

from mf_train.errors import PeerError, UserError
from mf_train.parallel.agreement import run_long_on_all, run_on_all
from mf_train.parallel.groups import start_processes
from mf_train.parallel.processes import find_process
from tests.distributed import run_distributed

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
COLLECTIVE_TIMEOUT = 10  # seconds
FAILURES = {
    "user": UserError("a.jsonl: line 3 is not JSON"),
    "system": OSError(5, "Input/output error", "a.bin"),
}
FAILING: list[dict[int, str]] = [  # by rank
    {},
    {0: "user"},
    {1: "user"},
    {2: "system", 1: "system"},
    {2: "user", 0: "system"},
]


def run_slowly(action: Any, stop: bool = False) -> Any:
    return run_long_on_all(action, CPU, lambda: stop, lambda: None)


def outcome_of(rank: int, failing: dict[int, str], slowly: bool) -> str:
    def act() -> int:
        if rank in failing:
            raise FAILURES[failing[rank]]
        return rank

    try:
        return f"result {run_slowly(act) if slowly else run_on_all(act, CPU)}"
    except PeerError as error:
        return f"peer {error.status}"
    except (UserError, OSError) as error:
        return f"{type(error).__name__} {error}"


def fail_beside_a_busy_rank(rank: int) -> tuple[str, float]:
    """Rank 1 fails while rank 0 is busy for a minute."""

    def act() -> None:
        if rank == 1:
            raise UserError("wrong")
        time.sleep(60 * (rank == 0))

    started = time.monotonic()
    try:
        run_slowly(act)
    except (UserError, PeerError) as error:
        return str(error), time.monotonic() - started
    raise AssertionError


def stop_beside_a_busy_rank(rank: int) -> tuple[int | None, float]:
    """Rank 1 is asked to stop while rank 0 is busy for a minute."""
    started = time.monotonic()
    result = run_slowly(lambda: time.sleep(60 * (rank == 0)) or 1, stop=rank == 1)
    return result, time.monotonic() - started


def cases(rank: int, world_size: int) -> dict[str, Any]:
    start_processes(find_process(), CPU, COLLECTIVE_TIMEOUT)
    return {
        "outcomes": [outcome_of(rank, case, slowly) for slowly in (False, True) for case in FAILING],
        "slow": run_slowly(lambda: time.sleep((COLLECTIVE_TIMEOUT + 3) * (rank == 1)) or rank),
        "failed": fail_beside_a_busy_rank(rank),
        "stopped": stop_beside_a_busy_rank(rank),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_distributed(cases, 3)


def test_rank_0_says_what_the_first_failing_rank_met(ranks: list[dict[str, Any]]) -> None:
    host = socket.gethostname()
    first, second, third = (found["outcomes"] for found in ranks)
    system = "[Errno 5] Input/output error: 'a.bin'"
    assert first == 2 * [
        "result 0",
        "UserError a.jsonl: line 3 is not JSON",
        f"UserError a.jsonl: line 3 is not JSON (rank 1 on {host})",
        f"OSError {system} (rank 1 on {host})",
        f"OSError {system}",
    ]
    for rank, said in ((1, second), (2, third)):
        assert said == 2 * [f"result {rank}", "peer 2", "peer 2", "peer 1", "peer 1"]


def test_a_failure_does_not_wait_for_a_busy_rank(ranks: list[dict[str, Any]]) -> None:
    first, second, third = (found["failed"] for found in ranks)
    assert first[0].startswith("wrong (rank 1 on ") and second[0] == third[0] == PeerError(2).args[0]
    assert max(seconds for _, seconds in (first, second, third)) < 30


def test_a_rank_may_take_longer_than_a_collective_may_wait(ranks: list[dict[str, Any]]) -> None:
    assert [found["slow"] for found in ranks] == [0, 1, 2]


def test_a_stop_does_not_wait_for_a_busy_rank(ranks: list[dict[str, Any]]) -> None:
    outcomes = [found["stopped"] for found in ranks]
    assert [result for result, _ in outcomes] == [None] * 3
    assert max(seconds for _, seconds in outcomes) < 30
