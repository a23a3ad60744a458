"""The layouts (P, stage, micro batch) of a configuration on so many devices: memory, time, cost, launch line."""

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.device_memory import RankMemory, estimate_memory
from mf_train.planning.devices import Device
from mf_train.planning.time import StepTime, estimate_step

NEAR = 1.05  # times the quickest step: nearer than the model can tell apart
USABLE = 0.92  # of a device's memory: what fragmentation of the allocator and other processes leave
HELD = ("parameters", "optimizer", "gradients", "activations", "codes", "logits", "buffers", "process")


# What takes less memory, in the order in which docs/memory.md says to switch it on
LIGHTER: tuple[tuple[str, str, str], ...] = (
    ("training", "recompute", "block"),
    ("parallel", "master", "split"),
    ("optimizer", "table_exp_avg_sq", "row"),
    ("optimizer", "table_exp_avg", "bfloat16"),
    ("optimizer", "table_exp_avg", "int8"),
    ("parallel", "offload", "optimizer"),
)


@dataclass(frozen=True)
class PlannedLayout:
    """One way to run the configuration, with what it needs."""

    config: Config
    nodes: int
    per_node: int
    memory: RankMemory
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

    def to_tree(self, price: float | None = None) -> dict[str, Any]:
        """Plain values for JSON: bytes and seconds, and the cost where an hour of one device has a price."""
        memory, training = self.memory, self.config.training
        return {
            "tensor": self.config.parallel.tensor,
            "data": self.data,
            "zero_stage": self.config.parallel.zero_stage,
            "micro_batch_size": training.micro_batch_size,
            "fits": self.fits,
            "bytes": {name: round(getattr(memory, name)) for name in HELD}
            | {"peaks": {name: round(value) for name, value in memory.peaks.items()}}
            | {"peak": round(memory.peak), "host": round(memory.host)},
            "seconds": {part.name: part.seconds for part in self.time.parts},
            "bounds": {part.name: part.bound for part in self.time.parts},
            "step_seconds": self.time.seconds,
            "tokens_per_second": self.time.tokens_per_second,
            "days": self.days,
            "device_hours": self.device_hours,
        } | ({} if price is None else {"cost": self.device_hours * price})


def make_layout(config: Config, nodes: int, per_node: int, device: Device) -> PlannedLayout:
    """What the configuration needs as it stands. Raises UserError where its degrees cannot work."""
    check_degrees(config, nodes * per_node)
    if per_node % config.parallel.tensor:
        raise UserError(
            f"parallel.tensor {config.parallel.tensor} does not divide the {per_node} processes of a node: a "
            "tensor-parallel group stays inside a node; change parallel.tensor or --gpus-per-node"
        )
    memory = estimate_memory(config, nodes * per_node, device.kind)
    time = estimate_step(config, nodes, per_node, device)
    return PlannedLayout(config, nodes, per_node, memory, time, memory.peak <= USABLE * device.memory)


def search(config: Config, nodes: int, per_node: int, device: Device) -> list[PlannedLayout]:
    """All layouts of the same global batch, those that fit first, the quickest first; else by memory."""
    found = list(_layouts(config, nodes, per_node, device))
    return sorted(
        found,
        key=lambda layout: (not layout.fits, layout.time.seconds if layout.fits else layout.memory.peak),
    )


def choose(layouts: Sequence[PlannedLayout]) -> PlannedLayout | None:
    """Of the layouts that fit and are within NEAR of the quickest, the one that needs the least memory."""
    fitting = [layout for layout in layouts if layout.fits]
    if not fitting:
        return None
    quickest = min(layout.time.seconds for layout in fitting)
    near = [layout for layout in fitting if layout.time.seconds <= NEAR * quickest]
    return min(near, key=lambda layout: layout.memory.peak)


def lighten(
    config: Config, nodes: int, per_node: int, device: Device
) -> tuple[dict[str, str], PlannedLayout] | None:
    """The fewest of LIGHTER, in their order, with which a layout fits, and the best of these; None where all do not do.

    What the configuration has already, or cannot have (split masters in float32), is left out.
    """
    changed: dict[str, str] = {}
    for section, key, value in LIGHTER:
        held = getattr(getattr(config, section), key)
        plain = value == "split" and config.training.precision == "float32"
        if plain or (held == "int8" and value == "bfloat16") or held in (value, "row"):
            continue
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
        changed[f"{section}.{key}"] = value
        if best := choose(search(config, nodes, per_node, device)):
            return changed, best
    return None


def stages(config: Config, nodes: int, per_node: int, device: Device) -> list[PlannedLayout]:
    """The configuration under each ZeRO stage that it can run under."""
    found = []
    for stage in (0, 1, 2, 3):
        with suppress(UserError):
            staged = replace(config, parallel=replace(config.parallel, zero_stage=stage))
            found.append(make_layout(staged, nodes, per_node, device))
    return found


def _layouts(config: Config, nodes: int, per_node: int, device: Device) -> Iterator[PlannedLayout]:
    batch = config.training.global_batch_size
    for tensor in (1, 2, 4, 8):
        for stage in (0, 1, 2, 3):
            for micro in divisors(batch):
                candidate = replace(
                    config,
                    parallel=replace(config.parallel, tensor=tensor, zero_stage=stage),
                    training=replace(config.training, micro_batch_size=micro),
                )
                if micro > max(1, batch * tensor // (nodes * per_node)):
                    break  # more than any rank has
                try:
                    yield make_layout(candidate, nodes, per_node, device)
                except UserError:
                    continue


def divisors(number: int) -> list[int]:
    """Ascending."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


@dataclass(frozen=True)
class Plan:
    """A configuration on so many devices: as it stands, the layouts that divide, and the best of them."""

    path: str
    overrides: Sequence[str]
    config: Config  # what the file and the overrides say
    nodes: int
    per_node: int
    device: Device
    configured: PlannedLayout | None
    refusal: str  # why there is none
    layouts: list[PlannedLayout]  # as `search` sorts them; one at least
    best: PlannedLayout | None
    lighter: dict[str, str]  # keys and values with which `best` fits; empty where it does without

    @property
    def base(self) -> Config:
        """The configuration where it can be run, or else the one that comes first."""
        return self.config if self.configured else (self.best or self.layouts[0]).config


def make_plan(
    path: str, overrides: Sequence[str], config: Config, nodes: int, per_node: int, device: Device
) -> Plan:
    """Raises UserError where no layout works."""
    try:
        configured, refusal = make_layout(config, nodes, per_node, device), ""
    except UserError as error:
        configured, refusal = None, str(error)
    layouts = search(config, nodes, per_node, device)
    if not layouts:
        raise UserError(f"no layout of {nodes} x {per_node} processes works; as configured: {refusal}")
    best = choose(layouts)
    lighter: dict[str, str] = {}
    if best is None and (lightened := lighten(config, nodes, per_node, device)):
        lighter, best = lightened
    return Plan(path, overrides, config, nodes, per_node, device, configured, refusal, layouts, best, lighter)


def launch_line(plan: Plan) -> str | None:
    """The command that submits the best layout; None where nothing fits, whatever is switched on."""
    if plan.best is None:
        return None
    old, new = _degrees(plan.config), _degrees(plan.best.config)
    changed: dict[str, object] = {key: value for key, value in new.items() if value != old[key]}
    changed |= plan.lighter
    kept = [override for override in plan.overrides if override.partition("=")[0] not in changed]
    per_node = "--tasks-per-node" if plan.device.kind == "cpu" else "--gpus-per-node"
    command = ["memoryformer", "launch", plan.path, *kept]
    command += [f"{key}={value}" for key, value in changed.items()]
    return shlex.join([*command, "--nodes", str(plan.nodes), per_node, str(plan.per_node)])


def _degrees(config: Config) -> dict[str, int]:
    return {
        "parallel.tensor": config.parallel.tensor,
        "parallel.zero_stage": config.parallel.zero_stage,
        "training.micro_batch_size": config.training.micro_batch_size,
    }
