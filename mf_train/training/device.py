"""The device that a process trains on, and what it does with its memory."""

import ctypes
from collections.abc import Mapping, MutableMapping

import torch

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.host_memory import available_memory
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.processes import Process
from mf_train.planning.device_memory import offloaded_bytes
from mf_train.processors import usable_processors

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def find_device(config: Config, process: Process) -> torch.device:
    """The device that `training.device` asks for; UserError where this process has none."""
    wanted = config.training.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("training.device is cuda and no CUDA device is visible: set training.device=cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", gpu_index(process.local_rank, torch.cuda.device_count()))


def gpu_index(local_rank: int, visible: int) -> int:
    """Which of the GPUs that a process sees is its own; UserError where none is.

    One that sees a single GPU takes it, as under `srun --gpus-per-task=1`; `parallel.groups.claim_gpu` finds those that
    see the same one.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank} has no GPU of its own ({visible} visible): start one process for each GPU"
        )
    return local_rank


def check_host_memory(config: Config, degrees: Degrees) -> None:
    """Raises UserError where a node's memory has no room for what its ranks put there with `parallel.offload`."""
    needed = offloaded_bytes(config, degrees.world_size) * max(1, degrees.node_size)
    available = available_memory() if needed else None
    if available is not None and needed > available:
        raise UserError(
            f"parallel.offload is 'optimizer' and the {max(1, degrees.node_size)} processes of this node need "
            f"{needed / 1e9:.1f} GB of host memory for it, of which {available / 1e9:.1f} GB are available: start more "
            "nodes, choose compact moments (docs/memory.md), or leave parallel.offload out"
        )


def limit_threads(environment: Mapping[str, str]) -> None:
    """Have torch compute with no more threads than a control group, such as a container's, gives processor time.

    More of them would stand still together whenever the time of all is used up. `OMP_NUM_THREADS` wins.
    """
    if "OMP_NUM_THREADS" not in environment and torch.get_num_threads() > (usable := usable_processors()):
        torch.set_num_threads(usable)


def make_deterministic(environment: MutableMapping[str, str]) -> None:
    """Have torch use deterministic operations alone, and raise where it has none; before the device's first product.

    On GPUs attention's backward pass and cuBLAS with several streams else add in an order that varies (torch
    documentation, "Reproducibility"). Hash, lookup and the reduction of gradients add in a fixed order anyway.
    """
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # every buffer is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def keep_freed_memory() -> None:
    """Keep the memory of freed tensors for the next ones, instead of handing it to the kernel and clearing it anew.

    Every step needs the same buffers; on the quickstart fresh pages cost a tenth of a step. glibc only (mallopt(3)).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
