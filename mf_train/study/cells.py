"""The grid of a study as numbered cells with resolved configurations, and what was left out of it and why."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mf_train.config import Config, ModelConfig
from mf_train.config.loading import config_to_tree, load_config, parse_config, read_tree
from mf_train.config.phases import phases_of
from mf_train.config.sections import schedule_problem
from mf_train.errors import UserError
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.device_memory import heaviest_phase, peak_bytes
from mf_train.planning.plan import USABLE
from mf_train.planning.time import estimate_step
from mf_train.planning.work import model_flops, run_work, step_tokens
from mf_train.run_folder import METRICS
from mf_train.study.study import LENGTHS, Study, Value
from mf_train.text import human_bytes

_PLACE = "this place of the grid"
CELLS = "cells"  # folder of the cells' configurations, NUMBER.yaml
# The dense peer does without these, so cells that differ in them alone are one run.
_MEMORY_KEYS = ("bits", "expand_bits", "score", "temperature", "ffn_inner_norm", "ffn_activation")


@dataclass(frozen=True)
class Cost:
    """Size and cost of all steps of a run, from its configuration alone."""

    tokens: int
    flops: float  # training FLOPs: `planning.work.model_flops`, the LM head's among them
    bytes_moved: float  # see `planning.work.step_bytes`
    parameters: int  # all
    table_parameters: int
    block_parameters: int  # without embedding and LM head


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    number: int
    values: dict[str, str]  # the axes' labels
    config: Config
    cost: Cost
    memory: float  # predicted peak of one process, bytes
    seconds: float | None  # predicted for all steps, where the budget names a device

    @property
    def folder(self) -> Path:
        return Path(self.config.training.output_dir)


@dataclass(frozen=True)
class LeftOut:
    """A place of the grid that is not run."""

    values: dict[str, str]
    reason: str


@dataclass(frozen=True)
class Grid:
    """All places of a study's grid, its last axis changing first: what is run, and what is not."""

    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]
    earlier: int = 0  # cells in the study's folder that are of none of its places


def describe_values(values: Mapping[str, str]) -> str:
    """The axes' labels of a place of the grid, in a line."""
    return " ".join(f"{name}={label}" for name, label in values.items())


def cell_folder(study: Study, number: int | str) -> Path:
    """The run folder of a cell."""
    return study.folder / f"cell-{number}"


def make_grid(study: Study) -> Grid:
    """Resolve every place of the grid.

    A cell keeps the number that it was first run under, so that axes may be extended later. Raises UserError where the
    base configuration is wrong; what a place's sizes do not allow is listed instead.
    """
    base = read_tree(study.base)
    base.pop("versions", None)
    parse_config(base, study.base)
    numbers = _recorded(study)
    taken = [int(path.name[5:]) for path in study.folder.glob("cell-*") if path.name[5:].isdigit()]
    free = itertools.count(max([*numbers.values(), *taken], default=-1) + 1)
    cells: dict[str, Cell] = {}
    left_out: list[LeftOut] = []
    for values in itertools.product(*(axis.values for axis in study.axes)):
        labels = {axis.name: value.label for axis, value in zip(study.axes, values, strict=True)}
        try:
            config = _resolve(study, base, values)
        except UserError as error:
            left_out.append(LeftOut(labels, str(error).removeprefix(f"{_PLACE}: ")))
            continue
        identity = _identity(config)
        if identity in cells:
            left_out.append(LeftOut(labels, f"the same run as cell {cells[identity].number}"))
            continue
        number = numbers[identity] if identity in numbers else next(free)
        training = replace(config.training, output_dir=str(cell_folder(study, number)))
        cells[identity] = Cell(
            number=number,
            values=labels,
            config=replace(config, training=training),
            cost=run_cost(config),
            memory=_peak_bytes(study, config),
            seconds=_predict_seconds(study, config),
        )
    kept, over = _within_budget(study, list(cells.values()))
    return Grid(tuple(kept), (*left_out, *over), len(numbers.keys() - cells.keys()))


def run_cost(config: Config) -> Cost:
    """Cost of all steps of a run."""
    counts, work = count_parameters(config.model), run_work(config)
    return Cost(
        **work._asdict(),
        parameters=counts.total,
        table_parameters=counts.tables,
        block_parameters=counts.total - counts.embedding - counts.head,
    )


def _resolve(study: Study, base: dict[str, Any], values: Sequence[Value]) -> Config:
    """The configuration of one place of the grid. Raises UserError where it cannot be run."""
    for value in values:
        if value.problem:
            raise UserError(value.problem)
    tree = copy.deepcopy(base)
    for key, setting in itertools.chain(study.settings, *(value.settings for value in values)):
        _set(tree, key, setting)
    config = parse_config(tree, _PLACE)
    for axis, value in zip(study.axes, values, strict=True):
        if axis.name in LENGTHS:
            assert value.length is not None
            config = _with_length(config, axis.name, value.length)
    warmup = config.schedule.warmup_steps
    if warmup is not None and warmup >= config.training.steps:
        raise UserError(
            f"schedule.warmup_steps {warmup} is not less than the {config.training.steps} steps: leave it out for 1 %"
        )
    for phase in phases_of(config, _PLACE):
        check_degrees(phase.config, study.processes)
        if problem := schedule_problem(phase.config.schedule, len(phase.schedule_steps)):
            raise UserError(problem)
    budget = study.budget
    if budget.memory_gb:
        limit, owner = 1e9 * budget.memory_gb, "budget.memory_gb"
    elif budget.device:
        limit, owner = USABLE * budget.device.memory, f"{USABLE:.0%} of budget.device {budget.device.name}"
    else:
        return config
    if (needed := _peak_bytes(study, config)) > limit:
        raise UserError(
            f"does not fit: a process needs {human_bytes(needed)} as predicted, and {owner} is {human_bytes(limit)}"
        )
    return config


def _peak_bytes(study: Study, config: Config) -> float:
    """Predicted peak of one process, on the budget's device where there is one."""
    device = study.budget.device
    kind = device.kind if device else None
    return peak_bytes(heaviest_phase(config, study.processes, kind).config, study.processes, kind)


def _predict_seconds(study: Study, config: Config) -> float | None:
    """Seconds of all steps; starting, validation and saving come on top."""
    budget = study.budget
    if budget.device is None:
        return None
    per_node = budget.processes_per_node or next(n for n in range(8, 0, -1) if study.processes % n == 0)
    return sum(
        phase.num_steps
        * estimate_step(phase.config, study.processes // per_node, per_node, budget.device).seconds
        for phase in phases_of(config)
    )


def _with_length(config: Config, axis: str, length: float) -> Config:
    """The configuration with as many whole steps as come nearest to the length."""
    if config.phases:
        raise UserError(
            f"axis {axis} sets training.steps, in which phases have their places: leave one of them out"
        )
    if axis == "flops":
        tokens = length / model_flops(config.model)
    else:
        tokens = length * (run_cost(config).parameters if axis == "tokens_per_parameter" else 1)
    steps = round(tokens / step_tokens(config))
    if steps < 1:
        raise UserError(f"{axis} {length:g} is less than one step of {step_tokens(config):,} tokens")
    return replace(config, training=replace(config.training, steps=steps))


def _within_budget(study: Study, cells: Sequence[Cell]) -> tuple[list[Cell], list[LeftOut]]:
    """Cells, cheapest first, until the budget's FLOPs or hours are used up; in the order of the grid.

    Those that have run are charged first and always kept: their results are there, whatever the budget is now.
    """
    limits = study.budget.flops or math.inf, 3600 * (study.budget.hours or math.inf)
    flops, seconds = 0.0, 0.0
    kept: set[int] = set()
    over: list[LeftOut] = []
    has_run = {cell.number for cell in cells if (cell.folder / METRICS).exists()}
    for cell in sorted(
        cells, key=lambda cell: (cell.number not in has_run, _price(study, cell), cell.number)
    ):
        with_it = flops + cell.cost.flops, seconds + (cell.seconds or 0.0)
        if cell.number in has_run or (with_it[0] <= limits[0] and with_it[1] <= limits[1]):
            kept.add(cell.number)
            flops, seconds = with_it
        elif with_it[0] > limits[0]:
            reason = f"{with_it[0]:.3g} FLOPs with it, budget.flops is {limits[0]:.3g}"
            over.append(LeftOut(cell.values, f"over the budget: {reason}"))
        else:
            reason = f"{with_it[1] / 3600:.3g} hours with it, budget.hours is {study.budget.hours:g}"
            over.append(LeftOut(cell.values, f"over the budget: {reason}"))
    return [cell for cell in cells if cell.number in kept], over


def _price(study: Study, cell: Cell) -> float:
    """What "cheapest first" goes by: hours where they are limited, else FLOPs."""
    return cell.seconds if study.budget.hours and cell.seconds is not None else cell.cost.flops


def _recorded(study: Study) -> dict[str, int]:
    """Numbers of the cells that the study's folder holds, by what they train. Raises UserError."""
    found: dict[str, int] = {}
    paths = [path for path in (study.folder / CELLS).glob("*.yaml") if path.stem.isdigit()]
    for path in sorted(paths, key=lambda path: int(path.stem)):
        found.setdefault(_identity(load_config(path)), int(path.stem))
    return found


def _identity(config: Config) -> str:
    """What a run trains, without its folder: two runs with one identity have the same loss."""
    tree = config_to_tree(config)
    del tree["training"]["output_dir"]
    if "memory" not in config.model.layer_kinds:
        standard = ModelConfig()
        tree["model"] |= {key: getattr(standard, key) for key in _MEMORY_KEYS}
    return json.dumps(tree, sort_keys=True)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
    tree[name] = value
