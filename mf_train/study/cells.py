"""The grid of a study as numbered cells with resolved configurations, and what was left out of it and why."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mf_train.config import Config, ModelConfig
from mf_train.config.loading import config_to_tree, load_config, parse_config, read_tree
from mf_train.errors import UserError
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.memory import peak_bytes
from mf_train.planning.work import model_flops, step_tokens
from mf_train.study.cost import Cost, run_cost
from mf_train.study.study import LENGTHS, Study, Value

_PLACE = "this place of the grid"
CELLS = "cells"  # folder of the cells' configurations, NUMBER.yaml
# The dense peer does without these, so cells that differ in them alone are one run.
_MEMORY_KEYS = ("bits", "expand_bits", "score", "temperature", "ffn_inner_norm", "ffn_activation")


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    number: int
    values: dict[str, str]  # the axes' labels
    config: Config
    cost: Cost
    seconds: float | None  # predicted, where the budget names a speed

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
    """All places of a study's grid: what is run, and what is not."""

    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]


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
    free = itertools.count(max(numbers.values(), default=-1) + 1)
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
        cost = run_cost(config)
        speed = study.budget.flops_per_second
        cells[identity] = Cell(
            number, labels, replace(config, training=training), cost, cost.flops / speed if speed else None
        )
    kept, over = _within_budget(study, list(cells.values()))
    return Grid(tuple(sorted(kept, key=lambda cell: cell.number)), (*left_out, *over))


def dump_tree(tree: dict[str, Any]) -> str:
    """YAML of a configuration."""
    text: str = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    return text


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
    check_degrees(config, study.processes)
    if limit := study.budget.memory_gb:
        needed = peak_bytes(config, study.processes) / 2**30
        if needed > limit:
            raise UserError(
                f"does not fit: a process needs {needed:.3g} GB, and budget.memory_gb is {limit:g}"
            )
    return config


def _with_length(config: Config, axis: str, length: float) -> Config:
    """The configuration with as many whole steps as come nearest to the length."""
    if axis == "flops":
        tokens = length / model_flops(config.model)
    else:
        tokens = length * (run_cost(config).parameters if axis == "tokens_per_parameter" else 1)
    steps = round(tokens / step_tokens(config))
    if steps < 1:
        raise UserError(f"{axis} {length:g} is less than one step of {step_tokens(config):,} tokens")
    return replace(config, training=replace(config.training, steps=steps))


def _within_budget(study: Study, cells: Sequence[Cell]) -> tuple[list[Cell], list[LeftOut]]:
    """Cells, cheapest first, until the budget's FLOPs or hours are used up."""
    budget = study.budget
    limits = [budget.flops or float("inf")]
    if budget.hours and budget.flops_per_second:
        limits.append(budget.hours * 3600 * budget.flops_per_second)
    limit, spent = min(limits), 0.0
    kept: list[Cell] = []
    over: list[LeftOut] = []
    for cell in sorted(cells, key=lambda cell: (cell.cost.flops, cell.number)):
        if over or spent + cell.cost.flops > limit:
            reason = f"over the budget: {cell.cost.flops:.3g} FLOPs after {spent:.3g} of {limit:.3g}"
            over.append(LeftOut(cell.values, reason))
        else:
            kept.append(cell)
            spent += cell.cost.flops
    return kept, over


def _recorded(study: Study) -> dict[str, int]:
    """Numbers of the cells that the study's folder holds, by what they train. Raises UserError."""
    found: dict[str, int] = {}
    for path in sorted(_numbered(study.folder / CELLS), key=lambda path: int(path.stem)):
        found.setdefault(_identity(load_config(path)), int(path.stem))
    return found


def _numbered(folder: Path) -> Iterable[Path]:
    return (path for path in folder.glob("*.yaml") if path.stem.isdigit())


def _identity(config: Config) -> str:
    """What a run trains, without its folder: two runs with one identity have the same loss."""
    tree = config_to_tree(config)
    del tree["training"]["output_dir"]
    if config.model.kind == "dense":
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
