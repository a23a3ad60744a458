"""Process groups by megatron-core, and the view of them that DeepSpeed asks for. The only file with megatron."""

import datetime
import logging
import socket
import warnings
from typing import Any

import torch
import torch.distributed as dist

from mf_train.parallel.degrees import Degrees
from mf_train.parallel.processes import Process


class Groups:
    """Tensor- and data-parallel groups of this rank; also DeepSpeed's `mpu` (DeepSpeed documentation, Megatron)."""

    def __init__(self, degrees: Degrees, timeout_seconds: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optional accelerator packages that it does without
            logging.getLogger("megatron").setLevel(logging.ERROR)
            from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=degrees.tensor,
            distributed_timeout_minutes=-(-timeout_seconds // 60),  # it takes whole minutes
            create_gloo_process_groups=False,
        )
        self.degrees = degrees
        self.tensor: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
        self.data: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        assert dist.get_rank(self.tensor) == degrees.tensor_rank
        assert dist.get_rank(self.data) == degrees.data_rank

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
    """Join the default process group: NCCL for CUDA, gloo for the CPU. A longer wait than the timeout raises."""
    port = process.master_port or _free_port()
    arguments: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        arguments["device_id"] = device
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"tcp://{process.master_address}:{port}",
        rank=process.rank,
        world_size=process.world_size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        **arguments,
    )


def stop_processes() -> None:
    """Leave the process groups, if they were joined."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
