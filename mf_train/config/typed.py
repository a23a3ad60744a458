"""Plain YAML values to the types that the sections declare; every mistake names its key and the remedy."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from mf_train.config.bounds import problem_of
from mf_train.config.paths import expand_path
from mf_train.errors import UserError
from mf_train.text import did_you_mean


def convert(annotation: Any, value: Any, key: str, origin: str) -> Any:
    """`value` as the annotated type, or UserError.

    Only int -> float, number-like text -> float (3e-4 is text in YAML) and YAML 1.1's yes, no, on, off -> bool convert.
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = typing.get_args(annotation)
        if type(value) in kinds:  # None too
            return value
        annotation, *others = (kind for kind in kinds if kind is not type(None))
        if others:
            names = " or ".join(_NAMES[kind] for kind in (annotation, *others))
            raise UserError(f"{origin}: {key} is {value!r}: expected {names}")
    if dataclasses.is_dataclass(annotation):
        return build(typing.cast(type, annotation), value, key, origin)
    if typing.get_origin(annotation) is dict:
        if not isinstance(value, dict | None):
            raise UserError(f"{origin}: {key} is {value!r}: expected keys and values")
        return value or {}
    if typing.get_origin(annotation) is tuple:
        return _convert_tuple(annotation, value, key, origin)
    if typing.get_origin(annotation) is typing.Literal:
        if value not in typing.get_args(annotation):
            choices = ", ".join(map(str, typing.get_args(annotation)))
            raise UserError(f"{origin}: {key} is {value!r}: choose one of {choices}")
        return value
    if annotation is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif annotation is bool and str(value).lower() in _SWITCH:
        return _SWITCH[str(value).lower()]
    elif isinstance(value, annotation) and not (annotation is int and isinstance(value, bool)):
        return value
    raise UserError(f"{origin}: {key} is {value!r}: expected {_NAMES.get(annotation, annotation)}")


def _convert_tuple(annotation: Any, value: Any, key: str, origin: str) -> tuple[Any, ...]:
    arguments = typing.get_args(annotation)
    if not isinstance(value, list | tuple):
        raise UserError(f"{origin}: {key} is {value!r}: expected a list")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise UserError(f"{origin}: {key} has {len(value)} values: expected {len(arguments)}")
    return tuple(
        convert(a, v, f"{key}[{i}]", origin) for i, (a, v) in enumerate(zip(arguments, value, strict=True))
    )


def build(section: type, tree: Any, key: str, origin: str) -> Any:
    """A section, or the whole configuration, of a mapping of its keys; None: all defaults. `key` is its own name.

    Raises UserError, beginning with `origin`.
    """
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: {key} is {tree!r}: expected keys and values")
    hints = typing.get_type_hints(section)
    fields = {field.name: field for field in dataclasses.fields(section)}
    values = {}
    for name, value in tree.items():
        dotted = f"{key}.{name}" if key else str(name)
        if name not in hints:
            hint = did_you_mean(name, hints, f"known keys: {', '.join(hints)}")
            raise UserError(f"{origin}: unknown key {dotted!r}: {hint}")
        values[name] = convert(hints[name], value, dotted, origin)
        if "path" in fields[name].metadata and values[name]:
            values[name] = expand_path(values[name], f"{origin}: {dotted}")
        if problem := problem_of(fields[name], values[name]):
            raise UserError(f"{origin}: {dotted} {problem}")
    try:
        return section(**values)
    except ValueError as error:
        raise UserError(f"{origin}: {error}") from None


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text, in quotes"}
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
