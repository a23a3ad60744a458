"""Failing together: what goes wrong on one rank ends all of them, and rank 0 says why."""

import socket
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
import torch.distributed as dist

from mf_train.errors import PeerError, TrainingError, UserError
from mf_train.exit_status import DONE, FAILED, MISTAKE
from mf_train.parallel.collectives import collective

T = TypeVar("T")
SIGN_OF_LIFE_SECONDS = 2.0


def run_on_all(action: Callable[[], T], device: torch.device) -> T:
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
    fail_together(failure, device)
    return result  # type: ignore[return-value]


def run_on_first(action: Callable[[], T], device: torch.device) -> T:
    """Run an action on rank 0 alone; every rank returns its result, and raises as `run_on_all`. Collective."""
    result = [run_on_all(action if dist.get_rank() == 0 else lambda: None, device)]
    with collective("rank 0's answer", device):
        dist.broadcast_object_list(result, 0, device=device)
    return result[0]  # type: ignore[return-value]


class Task(Generic[T]):
    """An action without collectives that runs in a thread of its own."""

    def __init__(self, action: Callable[[], T]) -> None:
        self._action = action
        self._results: list[T] = []
        self._failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._results.append(self._action())
        except BaseException as error:  # raised again by `outcome`
            self._failures.append(error)

    def wait(self, seconds: float) -> None:
        """Wait for the end, at most so long."""
        self._thread.join(seconds)

    @property
    def busy(self) -> bool:
        return self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return bool(self._failures)

    def outcome(self) -> T | None:
        """The action's result; None while it is busy. Raises the action's error."""
        if self._failures:
            raise self._failures[0]
        return self._results[0] if self._results else None


def run_long_on_all(
    action: Callable[[], T], device: torch.device, stop: Callable[[], bool], still_alive: Callable[[], None]
) -> T | None:
    """As `run_on_all`, for an action that may take longer on some ranks than a collective may wait.

    It runs in a thread, and all ranks tell each other every two seconds whether they are ready, so that no collective
    waits long. A failure ends the waiting at once; so does `stop()` on any rank, and then the result is None on all.
    `still_alive` is called each time: the run's `Watch` ends what does not move.
    """
    task = Task(action)
    while True:
        task.wait(SIGN_OF_LIFE_SECONDS)
        still_alive()
        any_busy, any_failed, any_stop = any_rank((task.busy, task.failed, stop()), device)
        if any_failed or not any_busy:
            break
        if any_stop:
            return None
    return run_on_all(task.outcome, device)  # None: another rank has failed


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag, whether it is set on any rank. Collective over all ranks."""
    state = torch.tensor([int(flag) for flag in flags], dtype=torch.int32, device=device)
    with collective("question to all ranks", device):
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
    return [bool(value) for value in state.tolist()]


def exclusive_or(values: Sequence[int], device: torch.device) -> list[int]:
    """XOR over all ranks of each of some numbers below 2^32. Collective; no library of collectives has XOR for all."""
    bits = torch.tensor(values, dtype=torch.int64).unsqueeze(-1) >> torch.arange(32) & 1
    total = bits.to(device, torch.int32)
    with collective("exclusive or over all ranks", device):
        dist.all_reduce(total)
    return [int(value) for value in ((total.cpu().long() & 1) << torch.arange(32)).sum(-1)]


def fail_together(failure: Exception | None, device: torch.device) -> None:
    """Raise where any rank has a failure, as `run_on_all` does. Collective over all ranks."""
    none = 2**31 - 1
    rank = dist.get_rank()
    status = DONE if failure is None else MISTAKE if isinstance(failure, UserError) else FAILED
    lowest = torch.tensor([rank * 4 + status if status else none], dtype=torch.int32, device=device)
    with collective("agreement of all ranks", device):
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
    raise UserError(message[0]) if status == MISTAKE else OSError(message[0])
