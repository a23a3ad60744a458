"""How collectives are counted, on CPUs and, by events that stand in for a device's, on GPUs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from mf_train.parallel.collectives import Ledger, Mark, Recorded, ledger, recorded, recording
from mf_train.parallel.exchange import Exchange
from tests.distributed import run_distributed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NONE = Mark(0, "none")


def test_on_a_cpu_a_call_that_returns_is_finished() -> None:
    ledger = Ledger()
    assert ledger.last() == (NONE, NONE)
    with ledger.note("first", CPU):
        assert ledger.last() == (Mark(1, "first"), NONE)
    assert ledger.last() == (Mark(1, "first"), Mark(1, "first"))
    with pytest.raises(RuntimeError), ledger.note("second", CPU):
        raise RuntimeError
    assert ledger.last() == (Mark(2, "second"), Mark(1, "first"))


@dataclass
class Device:
    """A stream that has come as far as `reached` events."""

    reached: int = 0
    events: int = 0
    fails: bool = False

    def record_event(self, event: Device.Event) -> None:
        self.events += 1
        event.number = self.events

    @dataclass
    class Event:
        stream: Device
        number: int = 0

        def elapsed_time(self, end: Device.Event) -> float:
            """Milliseconds: an event comes every two seconds."""
            return 2000.0 * (end.number - self.number)

        def query(self) -> bool:
            if self.stream.fails:
                raise RuntimeError("CUDA error")
            return self.number <= self.stream.reached


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    stream = Device()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Device.Event(stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return stream


def test_on_a_gpu_what_the_device_has_come_to_counts(device: Device) -> None:
    ledger = Ledger()
    for name in ("a", "b", "c"):
        with ledger.note(name, GPU):
            pass
    a, b, c = Mark(1, "a"), Mark(2, "b"), Mark(3, "c")
    expected = [(NONE, NONE), (a, NONE), (a, a), (b, a), (b, b), (c, b), (c, c)]
    for device.reached, marks in enumerate(expected):
        assert ledger.last() == marks
        assert ledger.seconds() == 2 * (device.reached // 2)  # of those that are finished
    with ledger.note("d", GPU):
        pass
    device.fails = True
    assert ledger.last() == (c, c)


def test_a_device_that_is_far_behind_costs_no_memory(device: Device) -> None:
    ledger = Ledger()
    for number in range(2000):
        with ledger.note(str(number), GPU):
            pass
    assert device.events == 2 * 512
    device.reached = device.events
    assert ledger.last() == (Mark(512, "511"),) * 2
    with ledger.note("last", GPU):
        pass
    device.reached = device.events
    assert ledger.last() == (Mark(2001, "last"),) * 2


def count(rank: int, world_size: int) -> tuple[Mark, Recorded, bool]:
    before = recorded()
    exchange = Exchange(dist.new_group([0, 1]))
    for number, call in enumerate(
        [exchange.all_gather] * 3 + [dist.all_reduce], start=1
    ):  # the last is not ours
        call(torch.ones(2))
        # Another thread notes it, after the call has returned. Gloo has two such threads: were the next call made
        # before, the two might note their numbers in the wrong order.
        deadline = time.monotonic() + 30
        while (after := recorded()).complete < before.complete + number and time.monotonic() < deadline:
            time.sleep(0.01)
    return (
        ledger.last()[1],
        Recorded(after.called - before.called, after.complete - before.complete),
        bool(recording()),
    )


@pytest.mark.distributed
def test_the_recorder_counts_over_all_groups() -> None:
    assert (
        run_distributed(count, 2, init=True)
        == [(Mark(3, "tensor-parallel all-gather"), Recorded(4, 4), True)] * 2
    )
