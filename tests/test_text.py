"""Words and sizes in the lines that users read, and the line that is rewritten."""

from __future__ import annotations

import io

import pytest

from mf_train.progress import ProgressLine
from mf_train.text import did_you_mean, first_line, human_bytes


def test_nearest_word() -> None:
    assert did_you_mean("stpes", ["steps", "seed"], "no idea") == "did you mean 'steps'?"
    assert did_you_mean(5, ["steps", "seed"], "no idea") == "no idea"


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 kB"), (999_999, "1000.0 kB"), (1e6, "1.0 MB"), (2**30, "1.1 GB"), (1.5e12, "1,500.0 GB")],
)
def test_sizes_are_decimal(size: float, text: str) -> None:
    assert human_bytes(size) == text


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one" and first_line(KeyError()) == "KeyError"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_is_rewritten_on_a_terminal_and_repeated_elsewhere() -> None:
    shown: list[str] = []
    for stream in (_Terminal(), io.StringIO()):
        line = ProgressLine(stream)
        line.show("a")
        line.show("b")
        line.say("stays")
        line.show("c")
        line.close()
        line.close()
        shown.append(stream.getvalue())
    assert shown == ["\ra\033[K\rb\033[K\nstays\n\rc\033[K\n", "a\nb\nstays\nc\n"]
