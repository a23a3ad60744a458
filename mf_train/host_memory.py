"""The memory that this process can still have."""

import re
from collections.abc import Iterator
from pathlib import Path

from mf_train.control_groups import own_groups

MEMINFO = Path("/proc/meminfo")
# The files of a control group: its limit, what it uses, and what of that the system takes back when memory is short
# (cgroup-v2.rst, cgroup-v1/memory.rst).
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory() -> int | None:
    """Bytes: the least of what the machine has left (proc(5), MemAvailable) and of what the limits leave of the control
    groups that this process is in, such as a SLURM job's or a container's; None where the system does not say.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return None
    return min([1024 * int(found[1]), *_left_in_groups()]) if found else None


def _left_in_groups() -> Iterator[int]:
    for folder, version in own_groups("memory"):
        yield from _left_in(folder, *(_V1 if version == 1 else _V2))


def _left_in(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        cached = re.search(rf"^{reclaimable} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such file in a container or at the top; "max"
        return
    yield max(0, most - used + (int(cached[1]) if cached else 0))
