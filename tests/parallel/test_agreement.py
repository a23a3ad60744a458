"""What goes wrong on any rank ends all of them, and rank 0 says why and where."""

from __future__ import annotations

import socket
import time

import pytest
import torch

from mf_train.errors import PeerError, UserError
from mf_train.parallel.agreement import run_long_on_all, run_on_all
from mf_train.parallel.groups import start_processes
from mf_train.parallel.processes import find_process
from tests.distributed import run_distributed

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")
FAILURES = {
    "user": UserError("a.jsonl: line 3 is not JSON"),
    "system": OSError(5, "Input/output error", "a.bin"),
}


def never() -> bool:
    return False


def outcome_of(rank: int, failing: dict[int, str], slowly: bool) -> str:
    def act() -> int:
        if rank in failing:
            raise FAILURES[failing[rank]]
        return rank

    try:
        return f"result {run_long_on_all(act, CPU, never, lambda: None) if slowly else run_on_all(act, CPU)}"
    except PeerError as error:
        return f"peer {error.status}"
    except (UserError, OSError) as error:
        return f"{type(error).__name__} {error}"


def outcomes(rank: int, world_size: int) -> list[str]:
    cases: list[dict[int, str]] = [
        {},
        {0: "user"},
        {1: "user"},
        {2: "system", 1: "system"},
        {2: "user", 0: "system"},
    ]
    return [outcome_of(rank, case, slowly) for slowly in (False, True) for case in cases]


def test_rank_0_says_what_the_first_failing_rank_met() -> None:
    host = socket.gethostname()
    first, second, third = run_distributed(outcomes, 3, init=True)
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


def busy(rank: int, world_size: int) -> tuple[str, float]:
    """Rank 1 fails while rank 0 is busy for a minute."""

    def act() -> None:
        if rank == 1:
            raise UserError("wrong")
        if rank == 0:
            time.sleep(60)

    started = time.monotonic()
    try:
        run_long_on_all(act, CPU, never, lambda: None)
    except (UserError, PeerError) as error:
        return str(error), time.monotonic() - started
    raise AssertionError


def test_a_failure_does_not_wait_for_a_busy_rank() -> None:
    first, second, third = run_distributed(busy, 3, init=True)
    assert first[0].startswith("wrong (rank 1 on ") and second[0] == third[0] == PeerError(2).args[0]
    assert max(seconds for _, seconds in (first, second, third)) < 30


def slow(rank: int, world_size: int) -> int | None:
    start_processes(find_process(), CPU, timeout_seconds=5)

    def act() -> int:
        time.sleep(8 * rank)
        return rank

    return run_long_on_all(act, CPU, never, lambda: None)


def test_a_rank_may_take_longer_than_a_collective_may_wait() -> None:
    assert run_distributed(slow, 2) == [0, 1]


def stopped(rank: int, world_size: int) -> tuple[int | None, float]:
    """Rank 1 is asked to stop while rank 0 is busy for a minute."""
    started = time.monotonic()
    result = run_long_on_all(lambda: time.sleep(60 * (rank == 0)) or 1, CPU, lambda: rank == 1, lambda: None)
    return result, time.monotonic() - started


def test_a_stop_does_not_wait_for_a_busy_rank() -> None:
    outcomes = run_distributed(stopped, 2, init=True)
    assert [result for result, _ in outcomes] == [None, None] and max(seconds for _, seconds in outcomes) < 30
