"""YAML and `section.key=value` overrides to a typed Config; every mistake names its key and the remedy."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from mf_train.config.groups import groups_problem
from mf_train.config.phases import Phase, phases_of, resolve_phases
from mf_train.config.sections import Config, schedule_problem, set_names
from mf_train.config.typed import build, convert
from mf_train.config.yaml_text import parse_yaml
from mf_train.errors import UserError
from mf_train.text import did_you_mean


def load_config(path: str | Path, overrides: typing.Sequence[str] = ()) -> Config:
    """Read a YAML file, apply dotted overrides (`training.steps=100`) in order, and check every key and type.

    Raises UserError naming the file and the key.
    """
    tree = read_tree(path)
    tree.pop("versions", None)  # a run's own config.yaml records package versions; they are not settings
    for override in overrides:
        apply_override(tree, override)
    return parse_config(tree, " with ".join([str(path), *overrides]))


def read_tree(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; {} for an empty file. Raises UserError naming the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name the YAML file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    tree = _parse_yaml(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'model:' at the top level")
    return tree


def parse_config(tree: dict[str, Any], origin: str) -> Config:
    """Typed Config of a parsed YAML tree. `origin` is named in errors. Raises UserError."""
    config: Config = build(Config, tree, key="", origin=origin)
    if problem := _profile_problem(config):
        raise UserError(f"{origin}: {problem}")
    phases = phases_of(config, origin)
    for index, phase in enumerate(phases):
        _check_together(phase, origin if index == 0 else f"{origin}: phases[{index - 1}]")
    return resolve_phases(config, phases)


def config_to_tree(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars of a Config: what config.yaml and checkpoints hold."""
    return _plain(dataclasses.asdict(config))


def convert_value(key: str, value: Any, origin: str) -> Any:
    """`value` as the type of a dotted key such as optimizer.learning_rate; its bound is not checked.

    Raises UserError for a key that no section has, and a value of another type.
    """
    annotation: Any = Config
    known: dict[str, Any] = {}
    for part in key.split("."):
        known = typing.get_type_hints(annotation) if dataclasses.is_dataclass(annotation) else {}
        if part not in known:
            hint = did_you_mean(part, known, "name it as section.key")
            raise UserError(f"{origin}: unknown key {key!r}: {hint}")
        annotation = known[part]
    if dataclasses.is_dataclass(annotation):
        raise UserError(f"{origin}: {key} is a section: name one of its keys")
    return convert(annotation, value, key, origin)


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set `section.key=value` in a parsed tree, the value read as YAML. Raises UserError on another form."""
    key, equals, value = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r}: write it as section.key=value, such as training.steps=100")
    node = tree
    for index, part in enumerate(parts[:-1]):
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            parent = ".".join(parts[: index + 1])
            raise UserError(f"override {override!r}: {parent} is not a section; set it as a whole")
    node[parts[-1]] = _parse_yaml(value, f"override {override!r}")


def _check_together(phase: Phase, origin: str) -> None:
    """Raises UserError where keys do not fit each other; what depends on the number of processes the trainer checks."""
    config, training = phase.config, phase.config.training
    if problem := schedule_problem(config.schedule, len(phase.schedule_steps)) or groups_problem(config):
        raise UserError(f"{origin}: {problem}")
    names = set_names(config.data)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"{origin}: data.validation has two sets named {twice[0]!r}: give each a name of its own"
        )
    if 0 < training.validation_sequences < len(names):
        raise UserError(
            f"{origin}: training.validation_sequences is {training.validation_sequences} and data.validation has "
            f"{len(names)} sets: raise it, so that each set has one"
        )
    if training.evaluate_interval and not training.evaluate_tasks:
        raise UserError(
            f"{origin}: training.evaluate_interval is {training.evaluate_interval} and training.evaluate_tasks is "
            "empty: name the tasks, or leave it out"
        )
    if config.parallel.master == "split" and config.training.precision == "float32":
        raise UserError(
            f"{origin}: parallel.master is 'split' and training.precision is float32, in which a weight lacks no bit "
            "of its master: leave parallel.master out, or set training.precision to bfloat16"
        )
    for name, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            if (source.path is None) == (source.hub is None):
                raise UserError(
                    f"{origin}: data.{name}[{index}]: give either 'path' (local files) or 'hub' (a dataset's name), "
                    "and not both"
                )


def _profile_problem(config: Config) -> str:
    """An error about `training.profile`, beyond the bounds of its keys; empty where it fits."""
    training, profile = config.training, config.training.profile
    if not profile.steps:
        return ""
    last = profile.start + profile.steps - 1
    if last > training.steps:
        return (
            f"training.profile asks for steps {profile.start} to {last} and training.steps is {training.steps}: lower "
            "training.profile.start or training.profile.steps"
        )
    for phase in config.phases:
        if profile.start < phase.start <= last:
            return (
                f"training.profile asks for steps {profile.start} to {last} and phase {phase.name!r} begins at step "
                f"{phase.start}: profile steps of one phase"
            )
    if not profile.ranks or min(profile.ranks) < 0 or len(set(profile.ranks)) < len(profile.ranks):
        return f"training.profile.ranks is {list(profile.ranks)}: name at least one rank, each once, counted from 0"
    return ""


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{origin}:{where} is not valid YAML ({problem})") from None
    except ValueError:  # of int(), beyond 4,300 digits
        raise UserError(f"{origin}: has a number of too many digits") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
