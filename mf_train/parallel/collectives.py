"""Which collective this rank has come to, and which it has finished: what tells who hangs where nobody waits in one.

Under NCCL a collective's call returns at once. The main thread stands where it next needs a number from the device, on
every rank the same, whoever is late. So each call is counted, on every rank in the same order:

    with collective("all-gather of codes", x.device):
        all_gather(...).wait()

A CUDA event before the call and one behind it, on the stream that is current, tell how far the device has come, and for
how long it was in the call. They are only asked, and nothing waits for them. A call with `async_op` is noted around its
wait.

torch's flight recorder counts those of libraries, too, group by group. It is switched on by
`training.environment.set_flight_recorder`.
"""

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

_MOST_PENDING = 512  # collectives with events: more are not noted until the device has caught up


class Mark(NamedTuple):
    """A collective: its number on this rank, from 1 on (0: none so far), and its name."""

    number: int = 0
    name: str = "none"


class _Pending(NamedTuple):
    mark: Mark
    reached: torch.cuda.Event
    done: torch.cuda.Event


class Ledger:
    """Counts collectives; any thread may. They have to come in the same order on every rank."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._started = self._finished = Mark()
        self._pending: deque[_Pending] = deque()
        self._seconds = 0.0

    @contextmanager
    def note(self, name: str, device: torch.device) -> Iterator[None]:
        """Around the call of a collective. On CUDA, what the current stream reaches and has finished counts."""
        with self._lock:
            self._count += 1
            mark = Mark(self._count, name)
        if device.type != "cuda":
            self._started = mark
            began = time.perf_counter()
            yield
            self._finished = mark
            with self._lock:
                self._seconds += time.perf_counter() - began
            return
        noted = len(self._pending) < _MOST_PENDING and not torch.cuda.is_current_stream_capturing()
        reached = _record(device) if noted else None
        yield
        if reached is not None:
            done = _record(device)
            with self._lock:
                self._pending.append(_Pending(mark, reached, done))
                self._look(most=2)  # so that the queue does not grow while the device keeps up

    def last(self) -> tuple[Mark, Mark]:
        """The last collective that this rank has started, and the last that it has finished."""
        with self._lock, suppress(RuntimeError):  # of a device that has failed
            self._look(most=_MOST_PENDING)
            for mark, reached, _ in self._pending:
                if not reached.query():
                    break
                self._started = mark
        return self._started, self._finished

    def seconds(self) -> float:
        """Time that this rank, on CUDA its current stream, has been in collectives that are finished."""
        with self._lock:
            self._look(most=_MOST_PENDING)
            return self._seconds

    def _look(self, most: int) -> None:
        while most and self._pending and self._pending[0].done.query():
            mark, reached, done = self._pending.popleft()
            self._started = self._finished = mark
            self._seconds += reached.elapsed_time(done) / 1000
            most -= 1


def _record(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.current_stream(device).record_event(event)
    return event


class Recorded(NamedTuple):
    """Collectives over all groups of this process: called, and known to be complete."""

    called: int = 0
    complete: int = 0


def recorded() -> Recorded:
    """By torch's flight recorders; zeros where they are off, or where torch has none for these groups."""
    counts = [_recorded_by(kind) for kind in _RECORDERS]
    return Recorded(sum(count.called for count in counts), sum(count.complete for count in counts))


def recording() -> bytes:
    """The flight recorder's dump, as torch writes it for `torchfrtrace`; empty where it is off."""
    kind = next((kind for kind in _RECORDERS if _recorded_by(kind).called), None)
    return b"" if kind is None else _dump(f"_dump_{kind}_trace", True, True, False)


_RECORDERS = ("nccl", "fr")  # torch's for NCCL, and from 2.9 on one for all other backends


def _recorded_by(kind: str) -> Recorded:
    text = _dump(f"_dump_{kind}_trace_json", False, False)
    groups: dict[str, dict[str, str]] = json.loads(text).get("pg_status", {}) if text else {}
    called, complete = (
        sum(max(0, int(group[f"last_{what}_collective"])) for group in groups.values())
        for what in ("enqueued", "completed")
    )
    return Recorded(called, complete)


def _dump(name: str, *arguments: bool) -> bytes:
    dump: Any = getattr(torch._C._distributed_c10d, name, None)
    return bytes(dump(*arguments)) if dump is not None else b""


ledger = Ledger()  # this process's
collective = ledger.note
