"""The layouts (P, stage, micro batch) of a configuration on so many devices: memory, time, cost, launch line."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.devices import Device
from mf_train.planning.memory import Memory, estimate_memory
from mf_train.planning.time import StepTime, estimate_step

NEAR = 1.05  # times the quickest step: nearer than the model can tell apart
USABLE = 0.92  # of a device's memory: what fragmentation of the allocator and other processes leave


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
    def name(self) -> str:
        parallel = self.config.parallel
        micro = self.config.training.micro_batch_size
        return f"P {parallel.tensor} x R {self.data}, ZeRO {parallel.zero_stage}, micro-batches of {micro}"

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


def choose(layouts: Sequence[Layout]) -> Layout | None:
    """Of the layouts that fit and are within NEAR of the quickest, the one that needs the least memory."""
    fitting = [layout for layout in layouts if layout.fits]
    if not fitting:
        return None
    quickest = min(layout.time.seconds for layout in fitting)
    near = [layout for layout in fitting if layout.time.seconds <= NEAR * quickest]
    return min(near, key=lambda layout: layout.memory.peak)


def stages(config: Config, nodes: int, per_node: int, device: Device) -> list[Layout]:
    """The configuration under each ZeRO stage. Raises UserError where its degrees do not divide."""
    return [
        make_layout(
            replace(config, parallel=replace(config.parallel, zero_stage=stage)), nodes, per_node, device
        )
        for stage in (0, 1, 2, 3)
    ]


def _layouts(config: Config, nodes: int, per_node: int, device: Device) -> Iterator[Layout]:
    batch = config.training.global_batch_size
    for tensor in (1, 2, 4, 8):
        for stage in (0, 1, 2, 3):
            for micro in _divisors(batch):
                candidate = replace(
                    config,
                    parallel=replace(config.parallel, tensor=tensor, zero_stage=stage),
                    training=replace(config.training, micro_batch_size=micro),
                )
                if _loses_gradients(candidate, nodes * per_node) and stage != config.parallel.zero_stage:
                    continue
                try:
                    yield make_layout(candidate, nodes, per_node, device)
                except UserError:
                    continue


def _divisors(number: int) -> list[int]:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


def _loses_gradients(config: Config, processes: int) -> bool:
    """Whether gradients of micro-batches are summed in bfloat16, where small ones are lost: `parallel.engine`."""
    training = config.training
    data = max(1, processes // config.parallel.tensor)
    several = training.global_batch_size > data * training.micro_batch_size
    return config.parallel.zero_stage == 0 and training.precision == "bfloat16" and several


def launch_line(path: str, overrides: Sequence[str], config: Config, layout: Layout, device: Device) -> str:
    """The command that submits the layout: `config` is what the file and the overrides say."""
    wanted = {
        "parallel.tensor": (config.parallel.tensor, layout.config.parallel.tensor),
        "parallel.zero_stage": (config.parallel.zero_stage, layout.config.parallel.zero_stage),
        "training.micro_batch_size": (
            config.training.micro_batch_size,
            layout.config.training.micro_batch_size,
        ),
    }
    changed = {key: new for key, (old, new) in wanted.items() if old != new}
    kept = [override for override in overrides if override.partition("=")[0] not in changed]
    per_node = "--tasks-per-node" if device.kind == "cpu" else "--gpus-per-node"
    command = ["memoryformer", "launch", path, *kept, *(f"{key}={value}" for key, value in changed.items())]
    return shlex.join([*command, "--nodes", str(layout.nodes), per_node, str(layout.per_node)])
