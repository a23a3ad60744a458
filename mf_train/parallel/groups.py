"""Process groups by megatron-core, and the view of them that DeepSpeed asks for. The only file with megatron."""

import datetime
import logging
import socket
import warnings
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from mf_train.errors import UserError
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.processes import Process


class Groups:
    """Tensor- and data-parallel groups of this rank; also DeepSpeed's `mpu` (DeepSpeed documentation, Megatron).

    Megatron-core says who is in them (order tp-dp) and makes at most these two, each with its members alone: a group of
    all ranks is the default one. Its own start, `initialize_model_parallel`, makes 5 W + 6 R + 3 P + 3 groups on every
    rank, of which two would be used, and so does each call that lists all groups of a kind. Where the default group is
    bound to a GPU (`bound_device`), a new one is split off it by all ranks at once: every rank makes the same number
    of groups, so that at most two such splits happen, of any number of ranks. Collective over all ranks.
    """

    def __init__(self, degrees: Degrees, timeout_seconds: int) -> None:
        everyone = dist.group.WORLD
        assert everyone is not None and dist.get_world_size() == degrees.world_size
        self.degrees = degrees
        self._everyone = self.tensor = self.data = everyone
        if degrees.world_size > 1:
            layout = _parallel_state().RankGenerator(
                tp=degrees.tensor, dp=degrees.data, ep=1, pp=1, cp=1, order="tp-dp"
            )
            timeout = datetime.timedelta(seconds=timeout_seconds)
            self.tensor, self.data = (self._group(layout, kind, timeout) for kind in ("tp", "dp"))
        assert dist.get_rank(self.tensor) == degrees.tensor_rank
        assert dist.get_rank(self.data) == degrees.data_rank

    def _group(self, layout: Any, kind: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
        (members,) = (ranks for ranks in layout.get_ranks(kind) if self.degrees.rank in ranks)
        if len(members) == self.degrees.world_size:
            return self._everyone
        group: dist.ProcessGroup = _parallel_state().create_group(
            members, timeout=timeout, use_local_synchronization=True, group_desc=kind
        )
        return group

    def get_model_parallel_world_size(self) -> int:
        return self.degrees.tensor

    def get_model_parallel_rank(self) -> int:
        return self.degrees.tensor_rank

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_world_size(self) -> int:
        return self.degrees.data

    def get_data_parallel_rank(self) -> int:
        return self.degrees.data_rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data


def start_processes(process: Process, device: torch.device, timeout_seconds: int) -> None:
    """Join the default process group: NCCL for CUDA, gloo for the CPU. A longer wait than the timeout raises.

    Raises UserError where another process has this one's GPU.
    """
    timeout = datetime.timedelta(seconds=timeout_seconds)
    address = f"tcp://{process.master_address}:{process.master_port or _free_port()}"
    store, _, _ = next(dist.rendezvous(address, process.rank, process.world_size, timeout=timeout))
    store.set_timeout(timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        claim_gpu(store, process.rank, gpu_uuid(device))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("default_pg", store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=timeout,
        device_id=bound_device(process, device),
    )


def bound_device(process: Process, device: torch.device) -> torch.device | None:
    """The device that the process group is bound to, which connects NCCL at once; None: at the first collective.

    Every later group of a bound one is split off it. In a group of one process that has failed (DeepSpeed issue 8248).
    """
    return device if device.type == "cuda" and process.world_size > 1 else None


def gpu_uuid(device: torch.device) -> str:
    """The name of a GPU, or of a part of one, which no other has."""
    return str(torch.cuda.get_device_properties(device).uuid)


def claim_gpu(store: dist.Store, rank: int, uuid: str) -> None:
    """Take a GPU for a rank in the store that all ranks share; UserError where another rank has taken it.

    UUIDs tell GPUs apart whatever CUDA_VISIBLE_DEVICES or a cgroup shows each process under the number 0.
    """
    owner = store.compare_set(f"mf_train/gpu/{uuid}", "", str(rank)).decode()
    if owner != str(rank):
        raise UserError(
            f"rank {rank} on {socket.gethostname()} has the same GPU as rank {owner}: start one process for each GPU, "
            "and show each process all GPUs of its node or one of its own (srun --gpus-per-task=1)"
        )


def stop_processes() -> None:
    """Leave the process groups, if they were joined."""
    if not dist.is_initialized():
        return
    if dist.get_world_size() > 1:
        _parallel_state().destroy_model_parallel()
    dist.destroy_process_group()


def _parallel_state() -> ModuleType:
    """Megatron-core's, whose import takes seconds: one process, which has one group, does without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optional accelerator packages that it does without
        logging.getLogger("megatron").setLevel(logging.ERROR)
        from megatron.core import parallel_state

    return parallel_state


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
