"""The control groups of Linux that this process is in: a SLURM job's, a container's, a service's.

Kernel documentation: admin-guide/cgroup-v2.rst, admin-guide/cgroup-v1/.
"""

from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def own_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Folders of the groups whose limits of "memory" or "cpu" hold here, and the version, 1 or 2, of their files.

    From the innermost outwards; a group may have no limit. Nothing where the system has no control groups.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:  # number:controllers:/path, without controllers in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = GROUPS / controller if controllers else GROUPS
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # a limit holds for the groups inside
            if folder.is_relative_to(root):
                yield folder, 1 if controllers else 2
