"""A line that says how far something is: rewritten in its place on a terminal, else printed now and then."""

from typing import TextIO


class ProgressLine:
    """One line of a stream. Whether it is a terminal is `terminal`; how often to show is the caller's choice."""

    def __init__(self, stream: TextIO) -> None:
        self.terminal = stream.isatty()
        self._stream = stream
        self._open = False  # the terminal's cursor stands behind a line that is still rewritten

    def show(self, text: str) -> None:
        """Put `text` in the place of what was shown; below it where the stream is no terminal."""
        if self.terminal:
            print(f"\r{text}\033[K", end="", file=self._stream, flush=True)
            self._open = True
        else:
            print(text, file=self._stream, flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays, below what was shown."""
        self.close()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """End the line that is shown, so that what is printed next stands below it."""
        if self._open:
            print(file=self._stream, flush=True)
        self._open = False
