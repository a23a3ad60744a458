"""Lines of the logs, and how they are written."""

from __future__ import annotations

import time

import pytest

from mf_train.launch.logs import (
    Ending,
    format_ending,
    format_head,
    format_request,
    is_request,
    parse_ending,
    parse_head,
)


@pytest.mark.parametrize(
    "ending",
    [
        Ending(3, "n2", 0, 1_800_000_000.125),
        Ending(70000, "node-12.cluster", 75, 1_800_000_000.0),
        Ending(0, "n1", 137, 1_800_000_000.5, note="out of memory?"),
        Ending(0, "n1", 139, 1_800_000_000.5),
        Ending(0, "n1", 128 + 35, 1_800_000_000.5),
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


def test_a_request_is_told_from_other_lines() -> None:
    assert is_request(format_request(3, "n2", 15))
    assert not is_request("rank 3 on n2 was asked")
