"""Small pieces of the lines that users read."""

import difflib
from collections.abc import Iterable, Sequence


def did_you_mean(word: object, known: Iterable[str], otherwise: str) -> str:
    """A question that names the nearest of the known words, or `otherwise` where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def no_such_column(
    what: str, wanted: str, columns: Sequence[str], setting: str = "the source's text_field"
) -> str:
    """The message about data that has other columns than the wanted one."""
    shown = ", ".join(map(repr, columns[:8])) or "none"
    return f"{what}: has no column {wanted!r} (it has {shown}): set {setting}"


def human_bytes(size: float) -> str:
    """A number of bytes in decimal units, such as 1.5 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message; the name of its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def time_left(seconds: float) -> str:
    """Seconds as 01:02:03 or, from a day on, to the minute: 2 d 07:33."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days:,} d {hour:02}:{minute:02}" if days else f"{hour:02}:{minute:02}:{second:02}"


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or, from a day on, 2-01:02:03, as SLURM writes it."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}-{hour:02}" if days else f"{hour}") + f":{minute:02}:{second:02}"
