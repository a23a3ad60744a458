"""What the system says of a process's memory, in bytes, and programs for `python -c` that print it."""

from pathlib import Path


def status(key: str) -> int:
    """VmRSS: resident; VmHWM: its peak since the start or `reset_peak`; VmData: private and writable."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def reset_peak() -> None:
    """Have the system forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")  # proc(5)


# A Python that has imported torch: prints its peak and its private memory.
BARE = """
import torch
from benchmarks.memory import status
print(status("VmHWM"), status("VmData"))
"""
# LIMIT ARGUMENTS: `memoryformer ARGUMENTS` with this much private memory at most (0: any); prints its peak.
LIMITED = """
import resource, sys
from benchmarks.memory import status
limit = int(sys.argv.pop(1))
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from mf_train.cli import main
try:
    main(sys.argv[1:])
finally:
    print(status("VmHWM"))
"""
