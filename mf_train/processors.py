"""The processors that this process can use, what others leave of them, their model and their caches."""

import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from mf_train.control_groups import own_groups

CACHES = Path("/sys/devices/system/cpu")
INFORMATION = Path("/proc/cpuinfo")
STATISTICS = Path("/proc/stat")


def usable_processors() -> int:
    """How many the process may run on (its affinity), and no more than its control groups give it the time of."""
    allowed = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota() -> float | None:
    """Seconds of processor time a second that the control groups allow at most; None where nothing limits it."""
    return min(_quotas(), default=None)


def busy_processors(seconds: float = 0.2) -> float | None:
    """How many of those that the process may run on others keep busy; it sleeps so long. None where it is not known."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    passed = [[now - then for now, then in zip(after[name], before[name], strict=True)] for name in after]
    if not passed or not all(map(sum, passed)):
        return None
    # idle, and idle while a disk is read
    return sum(1 - (ticks[3] + ticks[4]) / sum(ticks) for ticks in passed)


def _ticks() -> dict[str, list[int]]:
    """Of each processor that the process may run on, by what it did (proc(5), /proc/stat)."""
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in STATISTICS.read_text().splitlines()]
    except OSError:
        return {}
    return {words[0]: [int(word) for word in words[1:9]] for words in lines if words and words[0] in names}


def _quotas() -> Iterator[float]:
    for folder, version in own_groups("cpu"):
        try:
            if version == 2:  # "200000 100000", or "max 100000"
                most, period = (folder / "cpu.max").read_text().split()
            else:  # -1: no limit
                most = (folder / "cpu.cfs_quota_us").read_text()
                period = (folder / "cpu.cfs_period_us").read_text()
            quota = int(most) / int(period)
        except (OSError, ValueError):  # no such file at the top or in a container; "max"
            continue
        if quota > 0:
            yield quota


def processor_name() -> str:
    """The processors' model (proc(5)), "unknown processor" where the system does not say."""
    try:
        lines = INFORMATION.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


def caches() -> dict[str, tuple[int, int]]:
    """Bytes of a processor's data caches by name, "L1" to "L3", and how many processors share one.

    Of the first that this process may run on; empty where the system does not say (sysfs, ABI/testing/
    sysfs-devices-system-cpu).
    """
    found = {}
    processor = min(os.sched_getaffinity(0))
    for folder in sorted((CACHES / f"cpu{processor}" / "cache").glob("index*")):
        try:
            kind, level, size, shared = (
                (folder / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
            number = re.fullmatch(r"(\d+)([KM])", size)
            if kind == "Instruction" or not number:
                continue
            found[f"L{level}"] = int(number[1]) * 1024 ** (1 + "KM".index(number[2])), _count(shared)
        except (OSError, ValueError):
            continue
    return found


def _count(listed: str) -> int:
    """Processors of a list such as "0-3,8"."""
    ends = [part.partition("-") for part in listed.split(",")]
    return sum(int(last or first) - int(first) + 1 for first, _, last in ends)
