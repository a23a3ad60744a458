"""Which cores a rank runs on. Linux gives a thread memory of the NUMA node that it runs on, so memory follows."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from mf_train.parallel.launcher import find_launcher
from mf_train.parallel.processes import Process

# With fewer, the rank's threads and its reader of data would stand in each other's way rather than other ranks'.
_LEAST_CORES = 2
_OWN_WAY = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES", "OMP_PROC_BIND")
_SYSTEM = Path("/sys/devices/system")


def bind_cores(
    process: Process, device: torch.device, environment: Mapping[str, str] = os.environ
) -> set[int]:
    """Bind this thread, and what it starts from now on, to the cores of its GPU's NUMA node, else to an even share.

    Returns the cores; empty where nothing was changed: where the rank is alone on its node or no launcher is known, and
    where the launcher or the user has bound it. torch uses no more threads than there are cores.
    """
    if process.local_size < 2 or any(name in environment for name in _OWN_WAY):
        return set()
    allowed = os.sched_getaffinity(0)
    if allowed != _unbound(environment):
        return set()
    cores = choose_cores(allowed, process.local_rank, process.local_size, gpu_node(device))
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(min(torch.get_num_threads(), len(cores)))
    return cores


def _unbound(environment: Mapping[str, str]) -> set[int]:
    """The cores of a rank that nobody has bound: torchrun's own, or under srun all there are; empty: not known."""
    launcher = find_launcher(environment)
    with suppress(OSError):
        if launcher is not None and launcher.name == "torchrun":
            return os.sched_getaffinity(launcher.pid) if launcher.pid else set()
        if launcher is not None or "SLURM_PROCID" in environment:
            return parse_list((_SYSTEM / "cpu/online").read_text())
    return set()


def choose_cores(
    allowed: set[int], local_rank: int, local_size: int, node: int | None, system: Path = _SYSTEM
) -> set[int]:
    """Of the allowed cores those of a NUMA node, or, where none is known, the share of one of the node's ranks.

    Shares are of one size and hold neighbours: first those of a NUMA node, and the threads of a core. Empty: too few.
    """
    nodes = {
        int(path.name[4:]): parse_list((path / "cpulist").read_text())
        for path in system.glob("node/node[0-9]*")
    }
    near = allowed & nodes.get(node, set()) if node is not None else set()
    if len(near) >= _LEAST_CORES:
        return near

    def place(cpu: int) -> tuple[int, int, int]:
        number = next((number for number, cpus in nodes.items() if cpu in cpus), 0)
        with suppress(OSError, ValueError):
            package = int((system / f"cpu/cpu{cpu}/topology/physical_package_id").read_text())
            core = int((system / f"cpu/cpu{cpu}/topology/core_id").read_text())
            return number, package * 65536 + core, cpu
        return number, cpu, cpu

    size = len(allowed) // local_size
    ordered = sorted(allowed, key=place)
    return set(ordered[local_rank * size :][:size]) if size >= _LEAST_CORES else set()


def gpu_node(device: torch.device, devices: Path = Path("/sys/bus/pci/devices")) -> int | None:
    """The NUMA node of a GPU, by its PCI address; None: no GPU, or a machine that does not tell."""
    if device.type != "cuda":
        return None
    properties: Any = torch.cuda.get_device_properties(device)  # torch's annotations lack the address
    address = f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):
        node = int((devices / address / "numa_node").read_text())
        return node if node >= 0 else None
    return None


def parse_list(text: str) -> set[int]:
    """`0-3,8` is {0, 1, 2, 3, 8}, as Linux writes lists of cores."""
    ends = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for first, _, last in ends for cpu in range(int(first), int(last or first) + 1)}
