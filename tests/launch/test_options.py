"""Times and arrays as sbatch reads them."""

from __future__ import annotations

import math

import pytest

from mf_train.errors import UserError
from mf_train.launch.options import array_tasks, time_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:15", 1815),
        ("1:30:15", 5415),
        ("2-3", 2 * 86400 + 3 * 3600),
        ("2-3:04", 2 * 86400 + 3 * 3600 + 240),
        ("2-03:04:05", 2 * 86400 + 3 * 3600 + 245),
        ("0", math.inf),
        ("UNLIMITED", math.inf),
    ],
)
def test_time_is_read_as_sbatch_reads_it(text: str, seconds: float) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-5", "1.5", "2-", "1:00 "])
def test_a_time_that_sbatch_does_not_read(text: str) -> None:
    with pytest.raises(UserError, match="--time"):
        time_seconds(text)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("0-2", [0, 1, 2]),
        ("1,3,5-7%2", [1, 3, 5, 6, 7]),
        ("0-10:4", [0, 4, 8]),
        ("7", [7]),
        ("2,1-2", [1, 2]),
    ],
)
def test_array_is_read_as_sbatch_reads_it(text: str, tasks: list[int]) -> None:
    assert array_tasks(text) == tasks


@pytest.mark.parametrize("text", ["", "a", "2-1", "0-2%", "0-2%0", "0-9:0", "1,,2", "0-1000000"])
def test_an_array_that_sbatch_does_not_read(text: str) -> None:
    with pytest.raises(UserError, match="--array"):
        array_tasks(text)
