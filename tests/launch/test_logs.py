"""Lines of the logs, and how they are written."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mf_train.launch.logs import Copy, Ending, format_ending, format_head, parse_ending, parse_head, say


@pytest.mark.parametrize(
    "ending",
    [
        Ending(3, "n2", 0, 1_800_000_000.125),
        Ending(70000, "node-12.cluster", 75, 1_800_000_000.0),
        Ending(0, "n1", 137, 1_800_000_000.5, note="out of memory?"),
        Ending(0, "n1", 139, 1_800_000_000.5),
        Ending(0, "n1", 128 + 35, 1_800_000_000.5),
        Ending(1, "n1", 143, 1_800_000_000.5, by_agent=True),
    ],
)
def test_an_ending_is_read_as_it_was_written(ending: Ending) -> None:
    line = format_ending(ending)
    assert parse_ending(line) == ending
    for cut in range(line.index("+00:00") + 6):
        assert parse_ending(line[:cut]) is None
    assert parse_ending("memoryformer: " + line) is None


def test_a_head_is_read_as_it_was_written() -> None:
    head = parse_head(format_head(12, "n3", "pid 7"))
    assert head is not None and head[:2] == (12, "n3")
    assert abs(head[2] - time.time()) < 10
    assert parse_head("rank 12 on n3 started") is None


def test_saying_is_not_held_up() -> None:
    """As by storage that hangs: a pipe that nobody empties."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    before = time.monotonic()
    say(writer, "more")
    assert time.monotonic() - before < 20
    os.close(reader)  # lets the thread go
    time.sleep(0.1)
    say(writer, "nobody reads")
    os.close(writer)


def test_a_copy_has_all_that_was_written_from_its_offset_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    reader, writer = os.pipe()
    copy = Copy(path, writer, len("before\n"))
    with path.open("a") as log:
        for number in range(100):
            log.write(f"line {number}\n")
            log.flush()
            time.sleep(0.005)
    copy.close(10)
    os.close(writer)
    with os.fdopen(reader) as copied:
        assert copied.read() == "".join(f"line {number}\n" for number in range(100))
