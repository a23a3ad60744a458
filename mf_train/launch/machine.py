"""What a node is, before a run: its versions, memory, limits and names. Needs no torch to say that there is none."""

import hashlib
import os
import platform
import re
import resource
import shutil
import socket
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import mf_train
from mf_train.host_memory import available_memory
from mf_train.versions import package_versions


def versions() -> dict[str, str]:
    """Versions of what takes part in a run, by name; what is not installed is missing. `mf_train`: a digest."""
    found = package_versions() | {"mf_train": source_digest()}
    found["glibc"] = platform.libc_ver()[1]
    found["kernel"] = platform.release()
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file() and (number := re.search(r"\s(\d+\.\d+[\d.]*)\s", driver.read_text())):
        found["driver"] = number[1]
    return found


def cuda_versions() -> dict[str, str]:
    """CUDA's and NCCL's versions as torch sees them; empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, nccl))}


def source_digest(folder: Path = Path(mf_train.__file__).parent) -> str:
    """12 hexadecimal digits of the SHA-256 of the package's sources, with their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh", ".sbatch"):
            digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def resources(folder: Path) -> dict[str, int]:
    """Bytes of memory that programs can have, of /dev/shm and of the folder's file system that
    are free; files that a process may open.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "memory": available_memory() or 0,
        "shared_memory": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "free": shutil.disk_usage(folder).free if folder.is_dir() else 0,
        "open_files": files if files != resource.RLIM_INFINITY else sys.maxsize,
    }


def compiler_problem(environment: Mapping[str, str] = os.environ) -> str | None:
    """Names what Triton misses here, or None. It compiles a launcher for each kernel when a run starts."""
    compilers = [environment["CC"].split()[0]] if environment.get("CC", "").strip() else ["gcc", "clang"]
    if not any(shutil.which(name, path=environment.get("PATH")) for name in compilers):
        return f"has no C compiler ({' or '.join(compilers)}), which Triton needs: install gcc"
    header = Path(sysconfig.get_path("include", "posix_prefix")) / "Python.h"
    return None if header.is_file() else f"has no {header}, which Triton needs: install Python's headers"


def name_problem(host: str, gloo: bool) -> str | None:
    """The problem, if any, with how `host` and, where gloo is used, this node's own name resolve to addresses."""
    own = socket.gethostname()
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"does not find the address of {host} ({error.strerror})"
    if not gloo:
        return None
    try:
        addresses = {str(place[4][0]) for place in socket.getaddrinfo(own, None)}
    except OSError as error:
        return f"does not find the address of its own name {own} ({error.strerror})"
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        return f"its own name {own} is only {', '.join(sorted(addresses))}: others cannot reach gloo there"
    return None
