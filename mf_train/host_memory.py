"""The memory that this process can still have."""

import re
from collections.abc import Iterator
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
# The files of a control group: its limit, what it uses, and what of that the system takes back when memory is short
# (kernel documentation: admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
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
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:/path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (GROUPS / "memory", _V1) if controllers else (GROUPS, _V2)
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for the groups inside
            if folder.is_relative_to(root):
                yield from _left_in(folder, *names)


def _left_in(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        cached = re.search(rf"^{reclaimable} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such file in a container or at the top; "max"
        return
    yield max(0, most - used + (int(cached[1]) if cached else 0))
