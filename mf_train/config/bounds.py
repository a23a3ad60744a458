"""Fields of `mf_train.config.sections` with a bound, which `mf_train.config.loading` checks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import Field, field
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Bound(NamedTuple):
    """The values that a key may have: a test, and what an error says of them."""

    holds: Callable[[Any], bool]
    words: str

    def __call__(self, default: T) -> T:
        """A field of a dataclass that has this bound."""
        bounded: T = field(default=default, metadata={"bound": self})
        return bounded


def path(default: T) -> T:
    """A field that holds a path, in which `~` and `$NAME` stand for what they do in a shell."""
    found: T = field(default=default, metadata={"path": True})
    return found


positive = Bound(lambda value: 0 < value < math.inf, "it must be a number above 0")
not_negative = Bound(lambda value: 0 <= value < math.inf, "it must be a number, 0 or more")
fraction = Bound(lambda value: 0 <= value <= 1, "it must be in [0, 1]")
small = Bound(lambda value: 0 <= value <= 0.01, "it must be in [0, 0.01]")
decay = Bound(lambda value: 0 <= value < 1, "it must be in [0, 1)")
betas = Bound(lambda values: all(0 <= value < 1 for value in values), "each must be in [0, 1)")
steps = Bound(
    lambda values: _are_steps(values), "each must be a step, or the first and the last of several: 1200-1210"
)
zero_stage = Bound(lambda value: value in (0, 1, 2, 3), "choose 0, 1, 2 or 3")


def step_ranges(steps: Iterable[int | str]) -> list[range]:
    """The steps that a list such as [7, "1200-1210"] names. Raises ValueError."""
    ends = [(each, each) if isinstance(each, int) else each.split("-") for each in steps]
    return [range(int(first), int(last) + 1) for first, last in ends]


def _are_steps(values: Any) -> bool:
    try:
        return all(0 < each.start < each.stop for each in step_ranges(values))
    except ValueError:
        return False


def problem_of(key: Field[Any], value: Any) -> str:
    """The end of an error about a field's value, "is 0: it must be ..."; empty where the value fits or is None."""
    bound: Bound | None = key.metadata.get("bound")
    if bound is None or value is None or bound.holds(value):
        return ""
    return f"is {list(value) if isinstance(value, tuple) else value}: {bound.words}"
