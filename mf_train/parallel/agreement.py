"""Failing together: what goes wrong on one rank ends all of them, and rank 0 says why."""

import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from mf_train.errors import PeerError, TrainingError, UserError

T = TypeVar("T")
_SIGN_OF_LIFE_SECONDS = 2.0
_USER_ERROR = 2  # exit status


def together(action: Callable[[], T], device: torch.device) -> T:
    """Run an action without collectives on every rank, and wait for all.

    Where any rank raises UserError, OSError or TrainingError, rank 0 raises the error of the lowest such rank, with its
    number and host, and every other rank raises PeerError with the same exit status. Collective over all ranks.
    """
    result: T | None = None
    failure: UserError | OSError | TrainingError | None = None
    try:
        result = action()
    except (UserError, OSError, TrainingError) as error:
        failure = error
    status = 0 if failure is None else _USER_ERROR if isinstance(failure, UserError) else 1
    agree(status, failure, device)
    return result  # type: ignore[return-value]


def together_slowly(action: Callable[[], T], device: torch.device, stop: Callable[[], bool]) -> T | None:
    """As `together`, for an action that may take longer on some ranks than a collective may wait.

    It runs in a thread, and all ranks tell each other every two seconds whether they are ready, so that no collective
    waits long. A failure ends the waiting at once; so does `stop()` on any rank, and then the result is None on all.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def act() -> None:
        try:
            results.append(action())
        except BaseException as error:  # raised again below
            failures.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    while True:
        thread.join(_SIGN_OF_LIFE_SECONDS)
        busy, failed = int(thread.is_alive()), int(bool(failures))
        state = torch.tensor([busy, failed, int(stop())], dtype=torch.int32, device=device)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        any_busy, any_failed, any_stop = state.tolist()
        if any_failed or not any_busy:
            break
        if any_stop:
            return None

    def outcome() -> T | None:
        if failures:
            raise failures[0]
        return results[0] if results else None  # nothing yet: another rank has failed

    return together(outcome, device)


def agree(status: int, failure: Exception | None, device: torch.device) -> None:
    """Raise if any rank's status is not 0, as `together` does."""
    none = 2**31 - 1
    rank = dist.get_rank()
    lowest = torch.tensor([rank * 4 + status if status else none], dtype=torch.int32, device=device)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    if int(lowest) == none:
        return
    first, status = divmod(int(lowest), 4)
    if first == rank == 0 and failure is not None:
        raise failure
    # rank 0 says it: launchers end the other ranks as soon as one has ended
    message = [f"{failure} (rank {first} on {socket.gethostname()})"]
    if first != 0:
        dist.broadcast_object_list(message, first, device=device)
    if rank != 0:
        raise PeerError(status)
    raise UserError(message[0]) if status == _USER_ERROR else OSError(message[0])
