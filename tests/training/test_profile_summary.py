"""Traces made by hand and at random: which part every moment, kernel and byte belongs to, against plain reckoning."""

from __future__ import annotations

import random
from typing import Any

import pytest

from mf_train.training.profile_summary import (
    BACKWARD,
    GRADIENTS,
    OTHER,
    Label,
    Trace,
    format_name,
    parse_name,
    table,
)

MAIN, AUTOGRAD = 100, 200  # threads
NODE = "autograd::engine::evaluate_function: "
PARTS = {"forward", BACKWARD, "optimizer"}


def span(
    name: str, start: float, end: float, category: str, thread: int = MAIN, **args: Any
) -> dict[str, Any]:
    times = {"ts": start, "dur": end - start}
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, **times, "args": args}


def named(name: str, start: float, end: float) -> dict[str, Any]:
    return span(name, start, end, "user_annotation")


def operation(
    name: str, start: float, end: float, number: int = -1, forward_thread: int = 0
) -> dict[str, Any]:
    thread = AUTOGRAD if forward_thread else MAIN
    numbers = {"Sequence number": number, "Fwd thread id": forward_thread} if number >= 0 else {}
    return span(name, start, end, "cpu_op", thread, **numbers)


def kernel(
    start: float, end: float, launched: float, correlation: int, thread: int = MAIN
) -> list[dict[str, Any]]:
    return [
        span("cudaLaunchKernel", launched, launched + 1, "cuda_runtime", thread, correlation=correlation),
        span("gemm", start, end, "kernel", 7, correlation=correlation),
    ]


def memory(moment: float, address: int, size: int, device: int = 1) -> dict[str, Any]:
    args = {"Addr": address, "Bytes": size, "Device Type": device}
    return {
        "ph": "i",
        "cat": "cpu_instant_event",
        "name": "[memory]",
        "tid": MAIN,
        "ts": moment,
        "args": args,
    }


def gpu_step() -> list[dict[str, Any]]:
    """One step of a model of one layer as on a GPU: the backward pass is in a thread of its own, the kernels later."""
    return [
        named("step 7", 0, 100),
        named("forward", 10, 40),
        named("layer 0", 12, 35),
        named("layer 0 / up", 15, 30),
        operation("aten::slice", 13, 14, 4),  # shows the next node's number, and makes none
        operation("aten::linear", 16, 28, 4),
        operation("aten::addmm", 17, 27, 4),  # makes node 4
        operation("aten::add", 31, 33, 5),  # the layer's own
        named("Optimizer.step#AdamW.step", 85, 89),  # another's range
        named(BACKWARD, 40, 80),
        operation(NODE + "AddBackward0", 45, 50, 5, 1),
        operation(NODE + "AddmmBackward0", 50, 60, 4, 1),
        {**operation(NODE + "torch::autograd::AccumulateGrad", 60, 64), "tid": AUTOGRAD},
        {**operation(NODE + "NotInThisTrace", 65, 66, 99, 1)},
        named("optimizer", 80, 95),
        *kernel(150, 190, launched=18, correlation=1),
        *kernel(200, 280, launched=52, correlation=2, thread=AUTOGRAD),
        *kernel(300, 302, launched=62, correlation=3, thread=AUTOGRAD),
        *kernel(310, 320, launched=90, correlation=4),
        *kernel(400, 500, launched=20, correlation=5, thread=999),  # of a thread that is no part of the step
        span("Memcpy", 600, 650, "gpu_memcpy", 7, correlation=77),  # whose launch is not in the trace
        span("layer 0 / up", 150, 190, "gpu_user_annotation", 7),
        memory(16, 1, 1000),
        memory(17, 9, 5000, device=0),
        memory(32, 2, 300),
        memory(52, 3, 700),
        memory(55, 1, -1000),
        memory(61, 4, 100),
        memory(91, 5, -40),  # allocated before the trace began
    ]


def test_a_gpu_s_step_by_hand() -> None:
    summary = Trace(gpu_step(), PARTS).summarise("cuda")
    found = {
        name: (used.calls, used.cpu_seconds, used.backward_cpu_seconds, used.device_seconds)
        for name, used in summary.parts.items()
    }
    expected = {
        "up": (1, 15 + 10, 10, 40 + 80),
        "layer": (1, 8 + 5, 5, 0),
        "forward": (1, 7, 0, 0),
        BACKWARD: (1, 5 + 1 + 14, 20, 0),
        GRADIENTS: (1, 4, 4, 2),
        "optimizer": (1, 15, 0, 10),
        OTHER: (1, 10 + 1 + 5, 1, 100 + 50),
    }
    assert found.keys() == expected.keys()
    for name, (calls, *microseconds) in expected.items():
        assert found[name][0] == calls, name
        assert found[name][1:] == pytest.approx([value / 1e6 for value in microseconds]), name
    assert summary.parts["up"].backward_device_seconds == pytest.approx(80e-6)
    assert (summary.cpu_seconds, summary.device_seconds) == pytest.approx((100e-6, 282e-6))
    assert list(summary.layers[0]) == ["layer", "up", GRADIENTS] and len(summary.layers) == 1
    assert summary.layers[0]["up"] == summary.parts["up"]


def test_a_gpu_s_memory_by_hand() -> None:
    found = Trace(gpu_step(), PARTS).summarise("cuda").memory
    assert (found.peak_bytes, found.peak_in) == (2000, "layer 0 / up (backward)")
    assert found.peak_by_part == {"up": 1700, "layer": 300}
    assert found.left_bytes == 1100
    cpu = Trace(gpu_step(), PARTS).summarise("cpu").memory
    assert (cpu.peak_bytes, cpu.peak_by_part) == (5000, {"up": 5000})


def test_the_backward_pass_gets_ranges() -> None:
    ranges = Trace(gpu_step(), PARTS).backward_ranges()
    assert [(event["name"], event["ts"], event["dur"], event["tid"]) for event in ranges] == [
        ("layer 0 (backward)", 45, 5, AUTOGRAD),
        ("layer 0 / up (backward)", 50, 10, AUTOGRAD),
        ("layer 0 / gradients (backward)", 60, 4, AUTOGRAD),
    ]


@pytest.mark.parametrize("seed", range(10))
def test_random_ranges_sum_to_the_whole(seed: int) -> None:
    """Against a look at every microsecond: the shortest of the ranges around it."""
    dice = random.Random(seed)
    events: list[dict[str, Any]] = []

    def fill(start: int, end: int, depth: int) -> None:
        while depth and end - start > 2 and dice.random() < 0.9:
            first = dice.randint(start, end - 2)
            last = dice.randint(first + 1, end - 1)  # shorter than what is around it
            events.append(named(f"layer {dice.randrange(3)} / {dice.choice('abc')}", first, last))
            fill(first, last, depth - 1)
            start = last

    steps = [(0, 400), (400, 650), (700, 900)]
    for number, (start, end) in enumerate(steps):
        events.append(named(f"step {number + 1}", start, end))
        fill(start, end, 4)
    expected: dict[tuple[str, int | None], int] = {}
    for moment in range(900):
        around = [event for event in events if event["ts"] <= moment < event["ts"] + event["dur"]]
        if not around:
            continue
        label = parse_name(min(around, key=lambda event: event["dur"])["name"], PARTS)
        assert label is not None
        key = (label.part, label.layer)
        expected[key] = expected.get(key, 0) + 1
    dice.shuffle(events)
    summary = Trace(events, PARTS).summarise("cpu")
    found = {
        (name, number): used.cpu_seconds
        for number, layer in enumerate(summary.layers)
        for name, used in layer.items()
        if used.cpu_seconds
    }
    found[OTHER, None] = summary.parts[OTHER].cpu_seconds
    assert found == pytest.approx({key: value / 1e6 for key, value in expected.items()})
    assert summary.cpu_seconds == pytest.approx(850e-6)
    assert sum(used.cpu_seconds for used in summary.parts.values()) == pytest.approx(850e-6)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("layer 12 / norm_ffn", Label("norm_ffn", 12)),
        ("layer 0", Label("layer", 0)),
        ("optimizer", Label("optimizer")),
        (BACKWARD, Label(BACKWARD, None, True)),
        ("step 3", Label(OTHER)),
        ("layer x / up", None),
        ("layers", None),
        ("Optimizer.step#AdamW.step", None),
    ],
)
def test_names_of_ranges(name: str, label: Label | None) -> None:
    assert parse_name(name, PARTS) == label
    if label is not None and label.part != OTHER:
        assert format_name(label) == name


def test_a_table_has_the_device_where_there_is_one() -> None:
    summary = Trace(gpu_step(), PARTS).summarise("cuda")
    lines = table(summary, 1).splitlines()
    (whole,) = [line for line in lines if line.startswith("whole") and "%" in line]
    assert whole.split() == ["whole", "1", "0.10", "0.04", "100.0", "%", "0.28", "0.08", "100.0", "%"]
    plain = [event for event in gpu_step() if not event["cat"].startswith(("kernel", "gpu"))]
    assert "device" not in table(Trace(plain, PARTS).summarise("cuda"), 1)
