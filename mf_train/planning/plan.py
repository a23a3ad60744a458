"""The layouts of a configuration on so many devices: memory, time, cost, launch line.

A layout is what changes no result but in the last bits: P, ZeRO stage, micro-batch, recomputation, split masters,
offload. The search is over all of these. How moments are held changes results: `lighten` tries that where no layout
fits, or none but with offload.
"""

import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from mf_train.config import Config
from mf_train.config.phases import Phase
from mf_train.errors import UserError
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.device_memory import RankMemory, estimate_memory, heaviest_phase, moment_bytes
from mf_train.planning.devices import Device
from mf_train.planning.time import StepTime, estimate_step

NEAR = 1.05  # times the quickest step: nearer than the model can tell apart
USABLE = 0.92  # of a device's memory: what fragmentation of the allocator and other processes leave
HELD = ("parameters", "optimizer", "gradients", "activations", "codes", "logits", "buffers", "process")

# The keys of a layout
LAYOUT = (
    ("parallel", "tensor"),
    ("parallel", "zero_stage"),
    ("training", "micro_batch_size"),
    ("training", "recompute"),
    ("parallel", "master"),
    ("parallel", "offload"),
)
# Kinds of moments that take less memory, in the order in which docs/memory.md says to switch them on
LIGHTER = (
    ("table_exp_avg", "bfloat16"),
    ("table_exp_avg_sq", "bfloat16"),
    ("table_exp_avg", "int8"),
    ("table_exp_avg_sq", "int8"),
    ("table_exp_avg_sq", "row"),
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
        degrees = f"P {parallel.tensor} x R {self.data}, ZeRO {parallel.zero_stage}, micro-batches of {micro}"
        return ", ".join([degrees, *self.switched_on])

    @property
    def switched_on(self) -> list[str]:
        """What the layout does to take less memory, in words."""
        training, parallel = self.config.training, self.config.parallel
        words = {
            "recompute": training.recompute == "block",
            "split": parallel.master == "split",
            "offload": parallel.offload == "optimizer",
        }
        return [word for word, on in words.items() if on]

    @property
    def days(self) -> float:
        """To the last of training.steps."""
        return self.time.seconds * self.config.training.steps / 86400

    @property
    def device_hours(self) -> float:
        return 24 * self.days * self.nodes * self.per_node

    def to_tree(self, price: float | None = None) -> dict[str, Any]:
        """Plain values for JSON: bytes and seconds, and the cost where an hour of one device has a price."""
        memory = self.memory
        return {
            "data": self.data,
            **{key: getattr(getattr(self.config, section), key) for section, key in LAYOUT},
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


@dataclass(frozen=True)
class Lighter:
    """Kinds of moments by their keys, and the best layout without offload that fits with them."""

    keys: dict[str, str]
    layout: PlannedLayout


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
    return sorted(_layouts(config, nodes, per_node, device), key=_by_use)


def frontier(layouts: Sequence[PlannedLayout]) -> list[PlannedLayout]:
    """Those of which no other is as quick and takes less memory, in the order of `search`."""
    found: list[PlannedLayout] = []
    for layout in sorted(layouts, key=lambda layout: (layout.time.seconds, layout.memory.peak)):
        if not found or layout.memory.peak < found[-1].memory.peak:
            found.append(layout)
    return sorted(found, key=_by_use)


def _by_use(layout: PlannedLayout) -> tuple[bool, float]:
    return not layout.fits, layout.time.seconds if layout.fits else layout.memory.peak


def choose(layouts: Sequence[PlannedLayout]) -> PlannedLayout | None:
    """Of the layouts that fit and are within NEAR of the quickest, the one that needs the least memory.

    One with offload only where all of these have it: how much memory the host has is not known here.
    """
    fitting = [layout for layout in layouts if layout.fits]
    if not fitting:
        return None
    quickest = min(layout.time.seconds for layout in fitting)
    near = [layout for layout in fitting if layout.time.seconds <= NEAR * quickest]
    return min(near, key=lambda layout: (layout.config.parallel.offload != "none", layout.memory.peak))


def lighten(config: Config, nodes: int, per_node: int, device: Device) -> Lighter | None:
    """The fewest of LIGHTER, in their order, with which a layout without offload fits; None where all do not do.

    Each has to take fewer bytes than what is held already. A kind that the configuration has chosen, which is any but
    float32, is changed after all others.
    """
    chosen = config.optimizer
    keys: dict[str, str] = {}
    for key, kind in sorted(LIGHTER, key=lambda each: getattr(chosen, each[0]) != "float32"):
        lighter = with_values(config, optimizer={key: kind})
        if moment_bytes(lighter) >= moment_bytes(config):
            continue
        config = lighter
        keys[f"optimizer.{key}"] = kind
        layouts = search(config, nodes, per_node, device)
        if best := choose([layout for layout in layouts if layout.config.parallel.offload == "none"]):
            return Lighter(keys, best)
    return None


def stages(config: Config, nodes: int, per_node: int, device: Device) -> list[PlannedLayout]:
    """The configuration under each ZeRO stage that it can run under."""
    found = []
    for stage in (0, 1, 2, 3):
        with suppress(UserError):
            found.append(
                make_layout(with_values(config, parallel={"zero_stage": stage}), nodes, per_node, device)
            )
    return found


def _layouts(config: Config, nodes: int, per_node: int, device: Device) -> Iterator[PlannedLayout]:
    batch = config.training.global_batch_size
    masters = ("float32",) if config.training.precision == "float32" else ("float32", "split")
    # on a CPU it saves nothing
    offloads = ("none", "optimizer") if device.kind == "cuda" else (config.parallel.offload,)
    for tensor, stage, recompute, master, offload in product(
        (1, 2, 4, 8), (0, 1, 2, 3), ("none", "block"), masters, offloads
    ):
        parallel = {"tensor": tensor, "zero_stage": stage, "master": master, "offload": offload}
        for micro in divisors(batch):
            if micro > max(1, batch * tensor // (nodes * per_node)):
                break  # more than any rank has
            training = {"micro_batch_size": micro, "recompute": recompute}
            candidate = with_values(config, parallel=parallel, training=training)
            try:
                yield make_layout(candidate, nodes, per_node, device)
            except UserError:
                continue


def with_values(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values of some keys, by section."""
    values = {name: replace(getattr(config, name), **keys) for name, keys in sections.items()}
    return replace(config, **values)


def divisors(number: int) -> list[int]:
    """Ascending."""
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*low, *(number // size for size in low)})


@dataclass(frozen=True)
class Plan:
    """A configuration on so many devices: as it stands, the layouts that divide, and the best of them."""

    path: str
    overrides: Sequence[str]
    run: Config  # what the file and the overrides say
    phase: Phase  # of the run, the one that takes the most memory: what is planned are its steps
    nodes: int
    per_node: int
    device: Device
    configured: PlannedLayout | None
    refusal: str  # why there is none
    layouts: list[PlannedLayout]  # of all, those that `frontier` leaves; one at least
    best: PlannedLayout | None
    # what would fit with other results, where no layout does or `best` needs the host's memory
    lighter: Lighter | None

    @property
    def config(self) -> Config:
        """That of the planned steps."""
        return self.phase.config

    @property
    def base(self) -> Config:
        """The configuration where it can be run, or else the one that comes first."""
        return self.config if self.configured else (self.best or self.layouts[0]).config


def make_plan(
    path: str, overrides: Sequence[str], config: Config, nodes: int, per_node: int, device: Device
) -> Plan:
    """A plan for a run's `config`. Raises UserError where no layout works."""
    run, phase = config, heaviest_phase(config, nodes * per_node, device.kind)
    config = phase.config
    try:
        configured, refusal = make_layout(config, nodes, per_node, device), ""
    except UserError as error:
        configured, refusal = None, str(error)
    layouts = search(config, nodes, per_node, device)
    if not layouts:
        raise UserError(f"no layout of {nodes} x {per_node} processes works; as configured: {refusal}")
    best = choose(layouts)
    lighter = None
    if best is None or best.config.parallel.offload != "none":
        lighter = lighten(config, nodes, per_node, device)
    shown = frontier(layouts)
    return Plan(
        path, overrides, run, phase, nodes, per_node, device, configured, refusal, shown, best, lighter
    )


def launch_line(plan: Plan, layout: PlannedLayout) -> str:
    """The command that submits a layout, or one with other kinds of moments."""
    held = phase_edits(plan, layout)
    changed = {key: value for key, value in _changed_keys(plan, layout).items() if key not in held}
    kept = [override for override in plan.overrides if override.partition("=")[0] not in changed]
    per_node = "--tasks-per-node" if plan.device.kind == "cpu" else "--gpus-per-node"
    command = ["memoryformer", "launch", plan.path, *kept]
    command += [f"{key}={value}" for key, value in changed.items()]
    return shlex.join([*command, "--nodes", str(plan.nodes), per_node, str(plan.per_node)])


def phase_edits(plan: Plan, layout: PlannedLayout) -> dict[str, str]:
    """Keys of a layout that the command line cannot change, since a phase of the run sets them: what to write there."""
    found = {}
    for key, value in _changed_keys(plan, layout).items():
        section, _, name = key.partition(".")
        setting = [
            phase.name
            for phase in plan.run.phases
            if phase.start <= plan.phase.first and name in getattr(phase, section, {})
        ]
        if setting:
            found[key] = f"{key}: {value} in phase {setting[-1]!r} of {plan.path}"
    return found


def _changed_keys(plan: Plan, layout: PlannedLayout) -> dict[str, object]:
    old, new = _searched_keys(plan.config), _searched_keys(layout.config)
    return {key: value for key, value in new.items() if value != old[key]}


def _searched_keys(config: Config) -> dict[str, object]:
    keys = *LAYOUT, *(("optimizer", key) for key, _ in LIGHTER)
    return {f"{section}.{key}": getattr(getattr(config, section), key) for section, key in keys}
