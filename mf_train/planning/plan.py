"""The layouts (P, stage, micro batch) that a configuration can train in on so many devices: memory, time, cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.devices import Device
from mf_train.planning.memory import Memory, estimate_memory
from mf_train.planning.time import StepTime, estimate_step

USABLE = 0.92  # of a device's memory: what fragmentation of the allocator and other processes leave
_SCALES = (8, 64, 512, 4096)


@dataclass(frozen=True)
class Layout:
    """One way to run the configuration, with what it needs."""

    config: Config
    nodes: int
    per_node: int
    memory: Memory
    time: StepTime
    fits: bool

    @property
    def data(self) -> int:
        """R."""
        return self.nodes * self.per_node // self.config.parallel.tensor

    @property
    def days(self) -> float:
        """To the last of training.steps."""
        return self.time.seconds * self.config.training.steps / 86400

    @property
    def device_hours(self) -> float:
        return 24 * self.days * self.nodes * self.per_node

    def to_tree(self) -> dict[str, Any]:
        """Plain values for JSON: bytes and seconds."""
        memory, training = self.memory, self.config.training
        names = (
            "parameters",
            "optimizer",
            "gradients",
            "activations",
            "codes",
            "logits",
            "buffers",
            "process",
        )
        return {
            "tensor": self.config.parallel.tensor,
            "data": self.data,
            "zero_stage": self.config.parallel.zero_stage,
            "micro_batch_size": training.micro_batch_size,
            "fits": self.fits,
            "bytes": {name: round(getattr(memory, name)) for name in names}
            | {"peaks": {name: round(value) for name, value in memory.peaks.items()}}
            | {"peak": round(memory.peak), "host": round(memory.host)},
            "seconds": {part.name: part.seconds for part in self.time.parts},
            "bounds": {part.name: part.bound for part in self.time.parts},
            "step_seconds": self.time.seconds,
            "tokens_per_second": self.time.tokens_per_second,
            "days": self.days,
            "device_hours": self.device_hours,
        }


def make_layout(config: Config, nodes: int, per_node: int, device: Device) -> Layout:
    """What the configuration needs as it stands. Raises UserError where its degrees do not divide."""
    check_degrees(config, nodes * per_node)
    if per_node % config.parallel.tensor:
        raise UserError(
            f"parallel.tensor {config.parallel.tensor} does not divide the {per_node} processes of a node: a "
            "tensor-parallel group stays inside a node; change parallel.tensor or --gpus-per-node"
        )
    memory = estimate_memory(config, nodes * per_node, device.kind)
    time = estimate_step(config, nodes, per_node, device)
    return Layout(config, nodes, per_node, memory, time, memory.peak <= USABLE * device.memory)


def search(config: Config, nodes: int, per_node: int, device: Device) -> list[Layout]:
    """All layouts of the same global batch, those that fit first, the quickest first; else by memory."""
    found = list(_layouts(config, nodes, per_node, device))
    return sorted(
        found,
        key=lambda layout: (not layout.fits, layout.time.seconds if layout.fits else layout.memory.peak),
    )


def _layouts(config: Config, nodes: int, per_node: int, device: Device) -> Iterator[Layout]:
    batch = config.training.global_batch_size
    for tensor in (1, 2, 4, 8):
        for stage in (0, 1, 2, 3):
            for micro in (size for size in range(1, batch + 1) if batch % size == 0):
                candidate = replace(
                    config,
                    parallel=replace(config.parallel, tensor=tensor, zero_stage=stage),
                    training=replace(config.training, micro_batch_size=micro),
                )
                try:
                    yield make_layout(candidate, nodes, per_node, device)
                except UserError:
                    continue


def scaling(config: Config, per_node: int, device: Device) -> dict[str, list[dict[str, float]]]:
    """Steps at 8 to 4096 devices. strong: the same global batch, as far as it divides; weak: the same for each rank
    of the data-parallel group, a batch of its own size. Modelled as `planning.time` says, not measured.
    """
    curves: dict[str, list[dict[str, float]]] = {"strong": [], "weak": []}
    smallest: int | None = None
    for devices in _SCALES:
        if devices % per_node:
            continue
        nodes, data = devices // per_node, devices // config.parallel.tensor
        training = config.training
        smallest = smallest or data
        share = max(1, training.global_batch_size // data)
        strong = replace(training, micro_batch_size=_divisor(share, training.micro_batch_size))
        own = max(1, training.global_batch_size // smallest)
        weak = replace(
            training,
            global_batch_size=own * data,
            micro_batch_size=_divisor(own, training.micro_batch_size),
        )
        for name, changed in (("strong", strong), ("weak", weak)):
            if changed.global_batch_size % data:
                continue  # fewer sequences than ranks, or a rest
            step = estimate_step(replace(config, training=changed), nodes, per_node, device)
            curves[name].append(
                {
                    "devices": devices,
                    "global_batch_size": changed.global_batch_size,
                    "step_seconds": step.seconds,
                    "tokens_per_second": step.tokens_per_second,
                    "tokens_per_second_per_device": step.tokens_per_second / devices,
                }
            )
    return curves


def _divisor(number: int, most: int) -> int:
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def summary(
    config: Config, device: Device, asked: Layout | None, layouts: list[Layout], shown: int
) -> list[str]:
    """Lines of text: the model, the configuration's own layout, the best ones."""
    counts = count_parameters(config.model)
    tokens = config.training.steps * config.training.global_batch_size * config.model.sequence_length
    lines = [
        f"{counts.total:,} parameters, {counts.tables:,} of them in tables; {tokens / 1e9:.3g} billion tokens; "
        f"{device.name}, {device.memory / 1e9:.0f} GB; modelled, not measured"
    ]
    if asked is not None:
        lines += ["", "as configured:", *_describe(asked)]
    head = f"{'P':>2} {'R':>5} {'ZeRO':>4} {'micro':>5} {'GB':>7} {'fits':>4} {'s/step':>9} {'tokens/s':>12} "
    lines += ["", head + f"{'days':>8} {'device-h':>10}"]
    for layout in layouts[:shown]:
        parallel = layout.config.parallel
        lines.append(
            f"{parallel.tensor:>2} {layout.data:>5} {parallel.zero_stage:>4} "
            f"{layout.config.training.micro_batch_size:>5} {layout.memory.peak / 1e9:>7.2f} "
            f"{'yes' if layout.fits else 'no':>4} {layout.time.seconds:>9.3f} {layout.time.tokens_per_second:>12,.0f} "
            f"{layout.days:>8.2f} {layout.device_hours:>10,.0f}"
        )
    if layouts and not layouts[0].fits:
        lines.append(f"nothing fits in {USABLE:.0%} of the memory: take more devices, or shorter rows")
    return lines


def _describe(layout: Layout) -> list[str]:
    memory = layout.memory
    names = ("parameters", "optimizer", "gradients", "activations", "codes", "logits", "buffers", "process")
    held = ", ".join(f"{name} {getattr(memory, name) / 1e9:.2f}" for name in names)
    peak = max(memory.peaks, key=lambda name: memory.peaks[name])
    lines = [
        f"  GB a rank: {held} (codes are among the activations)",
        f"  peak {memory.peak / 1e9:.2f} GB at the {peak}, {'fits' if layout.fits else 'DOES NOT FIT'}; "
        f"host memory for saving beside the steps: {memory.host / 1e9:.2f} GB",
    ]
    for part in sorted(layout.time.parts, key=lambda part: -part.seconds):
        share = part.seconds / layout.time.seconds
        lines.append(f"  {part.name:<18} {part.seconds:>9.4f} s  {share:>4.0%}  bound: {part.bound}")
    return lines
