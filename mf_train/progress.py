"""A line that says how far something is: rewritten in its place on a terminal, else printed now and then."""

import errno
import os
from contextlib import suppress
from typing import TextIO


class ProgressLine:
    """One line of a stream. Whether it is a terminal is `terminal`; how often to show is the caller's choice.

    A terminal that is closed takes nothing more, and what shows itself on it goes on.
    """

    def __init__(self, stream: TextIO) -> None:
        self.terminal = stream.isatty()
        self._stream = stream
        self._open = False  # the terminal's cursor stands behind a line that is still rewritten

    def show(self, text: str) -> None:
        """Put `text`, cut to the terminal's width, in the place of what was shown; below it where there is none."""
        if self.terminal:
            self._write(f"\r{text[: self._width()]}\033[K")
            self._open = True
        else:
            self._write(f"{text}\n")

    def say(self, text: str) -> None:
        """Print a line that stays, below what was shown."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """End the line that is shown, so that what is printed next stands below it."""
        if self._open:
            self._write("\n")
        self._open = False

    def _width(self) -> int | None:
        """Characters that fit, with a place for the cursor; None where the terminal has not said."""
        with suppress(OSError):
            if columns := os.get_terminal_size(self._stream.fileno()).columns:
                return columns - 1
        return None

    def _write(self, text: str) -> None:
        try:
            print(text, end="", file=self._stream, flush=True)
        except OSError as error:
            if not self.terminal or error.errno != errno.EIO:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # takes also what is still in the stream's buffer
            os.close(null)
