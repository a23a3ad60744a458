"""Devices and networks: a small table of rates (devices.yaml), which measured values override."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mf_train.errors import UserError

_NUMBERS = ("memory", "copy", "gather", "launch", "host")
_TABLES = ("flops", "inside", "between", "peak")
FILE_KEYS = (
    "kind",
    *_NUMBERS,
    "flops",
    "inside",
    "between",
)  # of a file that stands by itself; it may have `peak`
# What the nested ones hold; nan: a file without a base has to give it.
_SHAPES: dict[str, dict[str, float]] = {
    "flops": {"float32": math.nan, "bfloat16": math.nan},
    "inside": {"bandwidth": math.nan, "latency": math.nan},
    "between": {"bandwidth": math.nan, "latency": math.nan},
}
_PEAKS = ("float32", "bfloat16", "memory")


@dataclass(frozen=True)
class Link:
    """Bytes a second of one rank, and seconds of one step of a ring."""

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Peak:
    """A data sheet's rates: FLOP a second by precision, bytes of memory a second."""

    flops: dict[str, float]
    memory: float


@dataclass(frozen=True)
class Device:
    """Rates of one device and of its network; units as in devices.yaml."""

    name: str
    kind: str  # cpu or cuda
    memory: float
    copy: float
    gather: float
    flops: dict[str, float]  # by precision
    launch: float
    host: float
    inside: Link
    between: Link
    measured: tuple[
        str, ...
    ]  # keys that were measured on such a device; the others are data sheets' or assumed


def find_device(name: str) -> Device:
    """The device of a name in devices.yaml, or of a YAML file of the same keys.

    A file with `base: NAME` gives some of the keys, the others are the base's; one without gives all of `FILE_KEYS`.
    Raises UserError for a name or a file without a device, and for values that are no positive numbers.
    """
    known = _known()
    if name.lower() in known:
        return _device(name.lower(), known[name.lower()], name)
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--device {name}: choose one of {', '.join(known)}, or a YAML file with measured rates"
        )
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--device {path}: cannot be read ({error})") from None
    if not isinstance(given, dict) or str(given.get("base", next(iter(known)))) not in known:
        raise UserError(f"--device {path}: name the device it changes, base: {' | '.join(known)}")
    if "base" not in given and (missing := [key for key in FILE_KEYS if key not in given]):
        raise UserError(
            f"--device {path}: lacks {', '.join(missing)}: give them, or name the device whose rates it changes, "
            f"base: {' | '.join(known)}"
        )
    tree = dict(known[given.pop("base")]) if "base" in given else {**_SHAPES, "peak": {}, "measured": []}
    changeable = [*FILE_KEYS, "peak"]
    for key, value in given.items():
        if key not in changeable:
            raise UserError(f"--device {path}: unknown key {key!r}; known: {', '.join(changeable)}")
        inner = _PEAKS if key == "peak" else _SHAPES.get(key)
        if inner is not None and (not isinstance(value, dict) or not set(value) <= set(inner)):
            raise UserError(f"--device {path}: {key} holds {', '.join(inner)}")
        tree[key] = tree.get(key, {}) | value if inner is not None else value
    # what the file gives is taken as measured
    rates = {key for key in given if key not in ("kind", "memory", "peak")}
    tree["measured"] = sorted({*tree["measured"], *rates})
    return _device(path.stem, tree, str(path))


def find_name(name: str) -> str | None:
    """The name in devices.yaml of the device that torch.cuda.get_device_name calls `name`; None where it has none."""
    return next((known for known, tree in _known().items() if name in tree["names"]), None)


def find_peak(name: str) -> Peak | None:
    """Peak rates of the device that torch.cuda.get_device_name calls `name`; None where devices.yaml has no such."""
    known = find_name(name)
    if known is None:
        return None
    peak = dict(_known()[known]["peak"])
    return Peak(memory=peak.pop("memory"), flops=peak)


def _known() -> dict[str, Any]:
    known: dict[str, Any] = yaml.safe_load(
        Path(__file__).with_name("devices.yaml").read_text(encoding="utf-8")
    )
    return known


def _device(name: str, tree: dict[str, Any], origin: str) -> Device:
    values = [tree[key] for key in _NUMBERS]
    values += [value for key in _TABLES for value in tree[key].values()]
    if any(isinstance(v, float) and math.isnan(v) for v in values):
        raise UserError(
            f"--device {origin}: flops must have float32 and bfloat16, inside and between bandwidth and latency, and "
            "rates must be numbers"
        )
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < math.inf for v in values):
        raise UserError(f"--device {origin}: rates must be numbers above 0 (YAML wants 2.7e+12, not 2.7e12)")
    if tree["kind"] not in ("cpu", "cuda"):
        raise UserError(f"--device {origin}: kind is {tree['kind']!r}: choose cpu or cuda")
    numbers = {key: float(tree[key]) for key in _NUMBERS}
    return Device(
        name=name,
        kind=tree["kind"],
        flops=tree["flops"],
        inside=Link(**tree["inside"]),
        between=Link(**tree["between"]),
        measured=tuple(tree["measured"]),
        **numbers,
    )
