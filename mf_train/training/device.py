"""The device that a process trains on, and what it does with its memory."""

import ctypes

import torch

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.parallel.processes import Process

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def find_device(config: Config, process: Process) -> torch.device:
    """What `training.device` asks for on this process; UserError where there is none."""
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda and no CUDA device is visible: set training.device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if process.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {process.local_rank} has no GPU of its own ({torch.cuda.device_count()} visible): start one "
            "process for each GPU"
        )
    return torch.device("cuda", process.local_rank)


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones, instead of handing it to the kernel and clearing it anew.

    Every step needs the same buffers; on the quickstart fresh pages cost a tenth of a step. glibc only (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
