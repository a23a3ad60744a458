"""What /proc/meminfo says, and where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mf_train import host_memory
from mf_train.host_memory import available_memory


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("MemTotal:  99 kB\nMemAvailable:   1234567 kB\nBuffers:  7 kB\n", 1234567 * 1024),
        ("MemTotal:  99 kB\nMemFree:  5 kB\n", None),
        (None, None),
    ],
)
def test_available_memory(
    text: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "MEMINFO", tmp_path / "meminfo")
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    assert available_memory() == expected


def test_this_machine() -> None:
    """Not more than it has: the C library's number of pages."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < (available_memory() or 0) <= whole
