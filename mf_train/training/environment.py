"""Environment variables that torch, OpenMP and Triton read. Imports none of them."""

import os
import stat
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mf_train.errors import UserError
from mf_train.processors import busy_processors, usable_processors

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"  # read by torch 2.8 and, first of all names, by 2.13
_ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
CACHE = "TRITON_CACHE_DIR"
# torch's flight recorder of collectives, by its names from torch 2.8 on; those with NCCL in them are older spellings.
RECORDER, RECORDER_FILE = "TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE"
_RECORDER_NAMES = (RECORDER, "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORDER_FILE_NAMES = (RECORDER_FILE, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
WAITING = "OMP_WAIT_POLICY"
_WAITING_NAMES = (WAITING, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_RECORDED = 2000  # collectives, the last ones
_TRIES = 100


def set_allocator(environment: MutableMapping[str, str]) -> None:
    """Let torch grow the blocks of its CUDA memory; before torch is imported. What the user has set stays.

    The loss takes and frees gigabytes in each micro-batch, which blocks of fixed size would cut up.
    """
    if not any(name in environment for name in _ALLOCATOR_NAMES):
        environment[ALLOCATOR] = "expandable_segments:True"


def set_flight_recorder(environment: MutableMapping[str, str], prefix: Path) -> None:
    """Have torch record the last collectives of each process, and write them to PREFIX and the rank when one times out.

    The watch ends a run before that and writes them itself (`parallel.watch`). What the user has set stays.
    """
    if not any(name in environment for name in _RECORDER_NAMES):
        environment[RECORDER] = str(_RECORDED)
    if not any(name in environment for name in _RECORDER_FILE_NAMES):
        environment[RECORDER_FILE] = str(prefix.absolute())
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")


def set_waiting(environment: MutableMapping[str, str]) -> str:
    """Have OpenMP's threads sleep while they wait for each other, where other programs keep processors busy; before
    torch is imported. Returns what to tell of it, empty where nothing is set. What the user has set stays.

    Threads that spin, as they do otherwise, are quicker on a quiet machine and take time from each other on a busy one:
    beside one busy program a step of the quickstart on two processors took twice as long.
    """
    if environment.get("OMP_NUM_THREADS") == "1" or any(name in environment for name in _WAITING_NAMES):
        return ""
    busy, processors = busy_processors(), usable_processors()
    if busy is None or busy < max(0.5, processors / 16):
        return ""
    environment[WAITING] = "passive"
    return (
        f"other programs keep {busy:.1f} of {processors} processors busy: threads sleep while they wait for "
        f"each other ({WAITING}=passive)"
    )


def set_kernel_cache(environment: MutableMapping[str, str]) -> None:
    """Have Triton keep compiled kernels on the node's own disk, rather than in a home that many nodes share.

    Processes that compile into one NFS folder at once see each other's files come and go, and fail. What the user has
    set stays. Raises UserError where there is no folder that is safe.
    """
    if CACHE not in environment:
        environment[CACHE] = str(private_folder(temporary_folder(environment), "mf_train-triton"))


def temporary_folder(environment: Mapping[str, str]) -> Path:
    """$TMPDIR where it is a folder on this node, else /tmp."""
    given = Path(environment.get("TMPDIR") or "/tmp")
    return given if given.is_dir() else Path("/tmp")


def private_folder(parent: Path, name: str) -> Path:
    """A folder in `parent` that this user alone can enter, the same for every process of the user on this node.

    Programs are loaded from it. So where its name is taken by another user's file, a link, or a folder that others may
    enter, the next number is tried. Raises UserError where none is free, or where others could replace it.
    """
    remedy = f"set {CACHE} to a folder of yours on the node's own disk"
    try:
        above = parent.stat()
        if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
            raise UserError(
                f"{parent}: every user may replace what is in it (it has no sticky bit): {remedy}"
            )
        for number in range(_TRIES):
            folder = parent / f"{name}-{os.geteuid()}{f'-{number}' if number else ''}"
            try:
                folder.mkdir(mode=0o700)
            except FileExistsError:
                pass
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
                return folder
    except OSError as error:
        raise UserError(
            f"{parent}: no folder for compiled kernels can be made ({error.strerror}): {remedy}"
        ) from None
    raise UserError(
        f"{parent}: {name}-{os.geteuid()} and {_TRIES - 1} more are not this user's alone: {remedy}"
    )
