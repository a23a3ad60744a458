"""A study as its YAML describes it: base configuration, axes, budget; every mistake is named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mf_train.config.loading import convert_value, read_tree
from mf_train.config.paths import expand_path
from mf_train.errors import UserError
from mf_train.planning.devices import Device, find_device
from mf_train.planning.ladder import ladder_size
from mf_train.text import did_you_mean

LENGTHS = ("tokens", "tokens_per_parameter", "flops")  # axes that set training.steps
# Short names of axes, and the keys that each sets.
AXES: dict[str, tuple[str, ...]] = {
    "kind": ("model.kind",),
    "bits": ("model.bits",),
    "expand_bits": ("model.expand_bits",),
    "learning_rate": ("optimizer.learning_rate",),
    "seed": ("training.seed", "data.seed"),
}
_NOT_YOURS = {
    "training.output_dir": "each cell has a folder in the study's output_dir",
    "checkpoint.resume": "a cell that was stopped goes on by itself",
}


@dataclass(frozen=True)
class Value:
    """One value of an axis: the keys that it sets, or the length of the run, or why it cannot be."""

    label: str
    settings: tuple[tuple[str, Any], ...] = ()
    length: float | None = None  # tokens, tokens per parameter, or FLOPs, as the axis is called
    problem: str = ""


@dataclass(frozen=True)
class Axis:
    """One axis of the grid."""

    name: str
    values: tuple[Value, ...]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the study may cost; None: no limit. Cells are taken cheapest first until it is used up."""

    flops: float | None = None  # training FLOPs of all cells
    hours: float | None = None  # of all cells one after another, as the planner predicts them for `device`
    memory_gb: float | None = None  # peak of one process, GB; None: what the planner leaves of the device's
    device: Device | None = None  # of the planner: its rates and memory
    processes_per_node: int | None = None  # None: up to 8


@dataclass(frozen=True, kw_only=True)
class Study:
    """A grid of runs."""

    path: Path
    base: str
    output_dir: str
    axes: tuple[Axis, ...]
    settings: tuple[tuple[str, Any], ...] = ()  # of all cells
    processes: int = 1  # of each cell
    budget: Budget = field(default_factory=Budget)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def load_study(path: str | Path) -> Study:
    """Read and check a study's file. Paths in it are relative to the working directory. Raises UserError."""
    path = Path(path)
    tree = read_tree(path)
    known = ("base", "output_dir", "processes", "settings", "axes", "budget")
    _check_keys(tree, known, str(path), "")
    for key in ("base", "output_dir"):
        if not isinstance(tree.get(key), str) or not tree[key]:
            raise UserError(f"{path}: {key} is {tree.get(key)!r}: give {_MEANING[key]}")
    if "{" in tree["output_dir"]:
        raise UserError(f"{path}: output_dir is {tree['output_dir']}: it must have no braces")
    processes = _count(tree.get("processes", 1), f"{path}: processes")
    settings = _settings(tree.get("settings") or {}, f"{path}: settings")
    axes = _axes(tree.get("axes"), str(path))
    _check_once(axes, settings, str(path))
    budget = _budget(tree.get("budget") or {}, str(path))
    if budget.processes_per_node and processes % budget.processes_per_node:
        raise UserError(
            f"{path}: budget.processes_per_node {budget.processes_per_node} does not divide processes {processes}"
        )
    return Study(
        path=path,
        base=expand_path(tree["base"], f"{path}: base"),
        output_dir=expand_path(tree["output_dir"], f"{path}: output_dir"),
        axes=axes,
        settings=settings,
        processes=processes,
        budget=budget,
    )


_MEANING = {
    "base": "the configuration that the cells change, such as configs/quickstart.yaml",
    "output_dir": "the folder for the cells' runs and the results, such as runs/studies/sizes",
}


def _axes(tree: Any, origin: str) -> tuple[Axis, ...]:
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{origin}: axes is {tree!r}: expected names and lists of values")
    axes = tuple(_axis(str(name), values, origin) for name, values in tree.items())
    lengths = [axis.name for axis in axes if axis.name in LENGTHS]
    if len(lengths) > 1:
        raise UserError(f"{origin}: axes {' and '.join(lengths)} both set training.steps: keep one of them")
    return axes


def _axis(name: str, tree: Any, origin: str) -> Axis:
    where = f"{origin}: axes.{name}"
    if name == "size":
        return Axis(name, _ladder(tree, where))
    if not isinstance(tree, list) or not tree:
        raise UserError(f"{where} is {tree!r}: expected a list of values")
    if name in AXES["seed"]:  # as a key like any other the best seed would pass for the best setting
        raise UserError(f"{where}: name the axis seed, which sets {' and '.join(AXES['seed'])}")
    if name in LENGTHS:
        values = [Value(_label(number), length=_positive(number, where)) for number in tree]
    elif name == "variant":
        values = [_variant(item, f"{where}[{index}]") for index, item in enumerate(tree)]
    elif name in AXES or "." in name:
        keys = AXES.get(name, (name,))
        values = [
            Value(_label(item), tuple((key, _checked(key, item, where)) for key in keys)) for item in tree
        ]
    else:
        names = ["size", "variant", *LENGTHS, *AXES]
        hint = did_you_mean(name, names, f"choose of {', '.join(names)}, or a dotted key")
        raise UserError(f"{origin}: unknown axis {name!r}: {hint}")
    labels = [value.label for value in values]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"{where}: {twice[0]} stands twice")
    return Axis(name, tuple(values))


def _ladder(tree: Any, where: str) -> tuple[Value, ...]:
    """Sizes by one dial, the depth d: d layers, d * width features, heads of head_size features."""
    if not isinstance(tree, dict):
        raise UserError(
            f"{where} is {tree!r}: expected depths, width (features a layer of depth) and head_size"
        )
    _check_keys(tree, ("depths", "width", "head_size"), where, "")
    width, head_size = (_count(tree.get(key), f"{where}.{key}") for key in ("width", "head_size"))
    depths = tree.get("depths")
    if not isinstance(depths, list) or not depths or not all(map(_is_count, depths)):
        raise UserError(f"{where}.depths is {depths!r}: expected a list of whole numbers above 0")
    if len(set(depths)) < len(depths):
        raise UserError(f"{where}.depths is {depths}: a depth stands twice")
    values = []
    for depth in depths:
        rest = depth * width % head_size
        problem = f"size.head_size {head_size} does not divide depth {depth} * width {width}"
        sizes = ladder_size(depth, width, head_size)
        settings = tuple((f"model.{key}", size) for key, size in sizes.items())
        values.append(Value(str(depth), settings, problem=problem if rest else ""))
    return tuple(values)


def _variant(tree: Any, where: str) -> Value:
    """Several keys that change together: {name: ..., section.key: value, ...}."""
    if not isinstance(tree, dict) or set(tree) <= {"name"}:
        raise UserError(f"{where} is {tree!r}: expected dotted keys with values, and perhaps a name")
    settings = _settings({key: value for key, value in tree.items() if key != "name"}, where)
    return Value(
        str(tree.get("name") or " ".join(f"{key}={_label(value)}" for key, value in settings)), settings
    )


def _settings(tree: Any, where: str) -> tuple[tuple[str, Any], ...]:
    if not isinstance(tree, dict):
        raise UserError(f"{where} is {tree!r}: expected dotted keys with values")
    return tuple((str(key), _checked(str(key), value, where)) for key, value in tree.items())


def _checked(key: str, value: Any, where: str) -> Any:
    if key in _NOT_YOURS:
        raise UserError(f"{where}: {key} is not for a study to set: {_NOT_YOURS[key]}")
    convert_value(key, value, where)
    return value


def _check_once(axes: Sequence[Axis], settings: Sequence[tuple[str, Any]], origin: str) -> None:
    """Raises UserError where two places set one key: the later would win without a word."""
    owners = {key: "settings" for key, _ in settings}
    for axis in axes:
        keys = {key for value in axis.values for key, _ in value.settings}
        if axis.name in LENGTHS:
            keys.add("training.steps")
        for key in sorted(keys):
            if key in owners:
                raise UserError(
                    f"{origin}: {key} is set by {owners[key]} and by axes.{axis.name}: keep one of them"
                )
            owners[key] = f"axes.{axis.name}"


def _budget(tree: Any, origin: str) -> Budget:
    names = [one.name for one in fields(Budget)]
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: budget is {tree!r}: expected some of {', '.join(names)}")
    _check_keys(tree, names, origin, "budget.")
    numbers = {
        key: _positive(tree[key], f"{origin}: budget.{key}")
        for key in ("flops", "hours", "memory_gb")
        if key in tree
    }
    if "hours" in numbers and "device" not in tree:
        raise UserError(
            f"{origin}: budget.hours needs budget.device, such as cpu, h100 or a file of measured rates"
        )
    device = None
    if "device" in tree:
        try:
            device = find_device(str(tree["device"]))
        except UserError as error:
            raise UserError(f"{origin}: budget.device: {str(error).removeprefix('--device ')}") from None
    per_node = tree.get("processes_per_node")
    if per_node is not None:
        _count(per_node, f"{origin}: budget.processes_per_node")
    return Budget(**numbers, device=device, processes_per_node=per_node)


def _check_keys(tree: dict[Any, Any], known: Sequence[str], origin: str, prefix: str) -> None:
    for key in tree:
        if key not in known:
            hint = did_you_mean(key, known, f"known keys: {', '.join(known)}")
            raise UserError(f"{origin}: unknown key {prefix}{key}: {hint}")


def _positive(value: Any, where: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) else float(value)  # YAML 1.1 reads 1e9 as text
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UserError(f"{where} is {value!r}: expected a number above 0")
    return number


def _count(value: Any, where: str) -> int:
    if not _is_count(value):
        raise UserError(f"{where} is {value!r}: expected a whole number above 0")
    return int(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
