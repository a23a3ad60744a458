"""Words and sizes in the lines that users read, and the line that is rewritten."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios

import pytest

from mf_train.progress import ProgressLine
from mf_train.text import did_you_mean, first_line, human_bytes, time_left


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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.9, "00:00:00"),
        (86399, "23:59:59"),
        (86400, "1 d 00:00"),
        (55.5 * 3600 + 199, "2 d 07:33"),
        (1e17, "1,157,407,407,407 d 09:46"),
    ],
)
def test_the_time_that_is_left_has_days(seconds: float, text: str) -> None:
    assert time_left(seconds) == text


def test_a_line_is_cut_to_the_terminal_and_outlives_it() -> None:
    """A terminal of 20 columns, then of a size that it does not tell, then closed."""
    text = "0123456789" * 3
    expected = f"\r{text[:19]}\033[K\r{text}\033[K\r\n{text}\r\n".encode()
    here, there = pty.openpty()
    with open(there, "w") as stream:
        line = ProgressLine(stream)
        for columns in (20, 0):
            fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
            line.show(text)
        line.say(text)
        shown = b""
        while len(shown) < len(expected):
            shown += os.read(here, 1000)
        os.close(here)
        line.show("nobody sees this")
        line.say("nor this")
    assert shown == expected
