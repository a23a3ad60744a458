"""Time, calls and memory of each part, from a profiler's trace, so that the parts sum to the whole.

A trace is the list of events in Chrome's format that torch.profiler exports: times in microseconds, `user_annotation`
events for named ranges, `cpu_op` events for operations, `kernel` and the like for what a GPU does.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Event = dict[str, Any]
STEP = "step "  # how the name of a step's range begins
BACKWARD, GRADIENTS, OTHER = "backward", "gradients", "other"

_NODE = "autograd::engine::evaluate_function: "
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")


class Label(NamedTuple):
    """Which part, of which layer where it is in one, and whether of its backward pass."""

    part: str
    layer: int | None = None
    backward: bool = False


@dataclass
class Usage:
    """One part's ranges entered over the profiled steps, and its seconds: of both passes, and of the backward alone.

    CPU seconds are those that the trainer's thread spent there, by the clock; device seconds those of the kernels
    and copies that were started there.
    """

    calls: int = 0
    cpu_seconds: float = 0.0
    device_seconds: float = 0.0
    backward_cpu_seconds: float = 0.0
    backward_device_seconds: float = 0.0

    def add(self, label: Label, *, cpu: float = 0.0, device: float = 0.0) -> None:
        """Seconds of one stretch of work."""
        self.cpu_seconds += cpu
        self.device_seconds += device
        if label.backward:
            self.backward_cpu_seconds += cpu
            self.backward_device_seconds += device


@dataclass
class Memory:
    """Bytes that the profiled steps had allocated at the moment of the peak: in all, and by the part that did.

    Memory from before the first of these steps (weights, moments) is not in it.
    """

    peak_bytes: int = 0
    peak_in: str = OTHER  # the part that ran then
    peak_by_part: dict[str, int] = field(default_factory=dict)
    left_bytes: int = 0  # not freed at the end


@dataclass
class Summary:
    """The whole, and each part's share of it: summed over layers, and layer by layer."""

    cpu_seconds: float
    device_seconds: float
    parts: dict[str, Usage]
    layers: list[dict[str, Usage]]
    memory: Memory


def parse_name(name: str, parts: Collection[str]) -> Label | None:
    """The label of a range "layer 3 / up", "layer 3", one of `parts` or a step's; None for others' ranges."""
    if name.startswith(STEP):
        return Label(OTHER)
    layer, _, part = name.partition(" / ")
    number = layer.removeprefix("layer ")
    if layer.startswith("layer ") and number.isdigit():
        return Label(part or "layer", int(number))
    return Label(name, backward=name == BACKWARD) if name in parts else None


def format_name(label: Label) -> str:
    """The name of a label's range: as `parse_name` reads it, with "(backward)" after it for a backward pass's."""
    name = label.part
    if label.layer is not None:
        name = f"layer {label.layer}" + ("" if name == "layer" else f" / {name}")
    return f"{name} (backward)" if label.backward and name != BACKWARD else name


class Trace:
    """The events of whole steps on one rank, each moment of them attributed to one part.

    Forward and everything else: the innermost range. Backward: an autograd node belongs to the part whose forward
    operation made it, which has the same sequence number. What a parameter's finished gradient sets off (adding it to
    what there is, ZeRO's copies and reductions) is the part "gradients" of the layer of the node before it.
    """

    def __init__(self, events: list[Event], parts: Collection[str]) -> None:
        self.events = events
        spans = [event for event in events if event.get("ph") == "X"]
        ranges = [
            (event, label)
            for event in spans
            if event.get("cat") == "user_annotation"
            and (label := parse_name(event["name"], parts)) is not None
        ]
        self.calls: dict[Label, int] = defaultdict(int)
        for _, label in ranges:
            self.calls[label] += 1
        self.nodes = _label_nodes(spans, _Timeline(ranges))
        for _, label in self.nodes:
            self.calls[label] += label.part == GRADIENTS
        self.timeline = _Timeline([*ranges, *self.nodes])
        self.threads = {event["tid"] for event, _ in (*ranges, *self.nodes)}

    def summarise(self, device: str) -> Summary:
        """`device`: "cpu" or "cuda", whose memory is counted."""
        parts: dict[str, Usage] = defaultdict(Usage)
        layers: list[dict[str, Usage]] = []

        def usages(label: Label) -> Iterator[Usage]:
            yield parts[label.part]
            if label.layer is not None:
                layers.extend(defaultdict(Usage) for _ in range(len(layers), label.layer + 1))
                yield layers[label.layer][label.part]

        for label, calls in self.calls.items():
            for used in usages(label):
                used.calls += calls
        for label, seconds in self.timeline.seconds():
            for used in usages(label):
                used.add(label, cpu=seconds)
        for label, seconds in self._device_work():
            for used in usages(label):
                used.add(label, device=seconds)
        parts = dict(sorted(parts.items(), key=lambda item: (-item[1].device_seconds, -item[1].cpu_seconds)))
        return Summary(
            sum(used.cpu_seconds for used in parts.values()),
            sum(used.device_seconds for used in parts.values()),
            parts,
            [dict(layer) for layer in layers],
            self._memory(device),
        )

    def backward_ranges(self) -> list[Event]:
        """Events that name what the backward pass does, as ranges name the rest: for the trace's picture."""
        merged: list[tuple[Event, Label]] = []
        for event, label in self.nodes:
            if label.part in (BACKWARD, OTHER):
                continue
            if merged and merged[-1][1] == label and merged[-1][0]["tid"] == event["tid"]:
                merged[-1][0]["dur"] = event["ts"] + event["dur"] - merged[-1][0]["ts"]
                continue
            place = {key: event[key] for key in ("ph", "pid", "tid", "ts", "dur")}
            merged.append(
                ({**place, "cat": "user_annotation", "name": format_name(label), "args": {}}, label)
            )
        return [event for event, _ in merged]

    def _label_at(self, event: Event) -> Label:
        label = self.timeline.at(event["ts"]) if event["tid"] in self.threads else None
        return label or Label(OTHER)

    def _device_work(self) -> Iterable[tuple[Label, float]]:
        """Label and seconds of everything that the device did, by the call that started it."""
        launches = {
            event["args"]["correlation"]: event
            for event in self.events
            if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
        }
        for event in self.events:
            if event.get("cat") in _ON_DEVICE:
                launch = launches.get(event["args"].get("correlation"))
                yield Label(OTHER) if launch is None else self._label_at(launch), event["dur"] / 1e6

    def _memory(self, device: str) -> Memory:
        kind = {"cpu": 0, "cuda": 1}[device]  # as torch numbers them
        changes = [
            event
            for event in self.events
            if event["name"] == "[memory]" and event["args"].get("Device Type") == kind
        ]
        changes.sort(key=lambda event: event["ts"])
        peak, peak_index, total = 0, -1, 0
        for index, (_, size) in enumerate(self._sizes(changes)):
            total += size
            if total > peak:
                peak, peak_index = total, index
        if peak_index < 0:
            return Memory(left_bytes=total)
        by_part: dict[str, int] = defaultdict(int)
        for label, size in self._sizes(changes[: peak_index + 1]):
            by_part[label.part] += size
        ordered = sorted(((part, size) for part, size in by_part.items() if size), key=lambda item: -item[1])
        return Memory(peak, format_name(self._label_at(changes[peak_index])), dict(ordered), total)

    def _sizes(self, changes: list[Event]) -> Iterable[tuple[Label, int]]:
        """Bytes allocated and freed (negative), with the label of the allocation; of frees, those of known memory."""
        live: dict[int, tuple[Label, int]] = {}
        for event in changes:
            address, size = event["args"]["Addr"], event["args"]["Bytes"]
            if size > 0:
                live[address] = self._label_at(event), size
                yield live[address]
            else:
                label, freed = live.pop(address, (Label(OTHER), 0))
                yield label, -freed


def table(summary: Summary, steps: int) -> str:
    """The parts of a step, the longest first: milliseconds a step, shares, and what of it is backward."""
    on_device = summary.device_seconds > 0
    head = f"{f'mean of {steps} steps':34}{'calls':>7}{'CPU ms':>10}{'backward':>10}{'share':>8}"
    lines = [head + (f"{'device ms':>11}{'backward':>10}{'share':>8}" if on_device else "")]

    def add(name: str, used: Usage) -> None:
        line = f"{name:34}{round(used.calls / steps, 2):7g}" + columns(
            used.cpu_seconds, used.backward_cpu_seconds, summary.cpu_seconds, 10
        )
        if on_device:
            line += columns(used.device_seconds, used.backward_device_seconds, summary.device_seconds, 11)
        lines.append(line)

    def columns(seconds: float, backward: float, whole: float, width: int) -> str:
        a_step = 1000 / steps
        return f"{seconds * a_step:{width}.2f}{backward * a_step:10.2f}{100 * seconds / whole:6.1f} %"

    for name, used in summary.parts.items():
        add(name, used)
    backward = sum(used.backward_cpu_seconds for used in summary.parts.values())
    backward_device = sum(used.backward_device_seconds for used in summary.parts.values())
    add("whole", Usage(steps, summary.cpu_seconds, summary.device_seconds, backward, backward_device))
    lines += ["", f"memory allocated at the peak, in {summary.memory.peak_in}: bytes by part"]
    lines += [f"{name:34}{size:17,}" for name, size in summary.memory.peak_by_part.items()]
    lines.append(f"{'whole':34}{summary.memory.peak_bytes:17,}")
    return "\n".join(lines) + "\n"


class _Timeline:
    """Which label each moment has: that of the innermost of the intervals around it."""

    def __init__(self, labelled: Iterable[tuple[Event, Label]]) -> None:
        self.starts: list[float] = []
        self.labels: list[Label | None] = []  # from each start to the next
        around: list[tuple[float, Label]] = []  # ends and labels, the innermost last
        intervals = [(event["ts"], event["ts"] + event["dur"], label) for event, label in labelled]
        for start, end, label in sorted(intervals, key=lambda interval: (interval[0], -interval[1])):
            self._leave(around, start)
            if around:
                end = min(end, around[-1][0])  # other threads' clocks and roundings
            around.append((end, label))
            self._mark(start, label)
        self._leave(around, float("inf"))

    def at(self, moment: float) -> Label | None:
        index = bisect_right(self.starts, moment) - 1
        return self.labels[index] if index >= 0 else None

    def seconds(self) -> Iterable[tuple[Label, float]]:
        """Each stretch's label and length; those outside all intervals are left out."""
        for start, end, label in zip(self.starts, self.starts[1:], self.labels, strict=False):
            if label is not None:
                yield label, (end - start) / 1e6

    def _leave(self, around: list[tuple[float, Label]], moment: float) -> None:
        while around and around[-1][0] <= moment:
            end, _ = around.pop()
            self._mark(end, around[-1][1] if around else None)

    def _mark(self, start: float, label: Label | None) -> None:
        self.starts.append(start)
        self.labels.append(label)


def _label_nodes(spans: list[Event], ranges: _Timeline) -> list[tuple[Event, Label]]:
    """Each autograd node's event, in the order of time, with the label of the forward operation that made the node."""
    made_in: dict[int, Label] = {}  # by sequence number
    nodes = []
    for event in sorted(spans, key=lambda event: event["ts"]):
        if event.get("cat") != "cpu_op":
            continue
        if event["name"].startswith(_NODE):
            nodes.append(event)
            continue
        number = event["args"].get("Sequence number", -1)
        if number >= 0 and not event["args"].get("Fwd thread id"):
            # many operations show the number of the next node; the last of them is the one that makes it
            made_in[number] = ranges.at(event["ts"]) or Label(OTHER)
    labelled: list[tuple[Event, Label]] = []
    for event in nodes:
        number = event["args"].get("Sequence number", -1)
        if number in made_in:
            label = made_in[number]._replace(backward=True)
        elif labelled and event["name"].endswith("AccumulateGrad"):
            # it has no number, and runs as soon as its gradient is there
            label = Label(GRADIENTS, labelled[-1][1].layer, backward=True)
        else:
            label = Label(OTHER, backward=True)
        labelled.append((event, label))
    return labelled
