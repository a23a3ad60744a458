"""Which process this is: alone, one of torchrun's, or one of srun's."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from mf_train.errors import UserError


@dataclass(frozen=True)
class Process:
    """Rank of this process and where rank 0 listens."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_address: str = "127.0.0.1"
    master_port: int = 0  # 0: any free port (only where there is one process)


def find_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read torchrun's variables, else those that srun sets for its tasks, else one process alone.

    A batch script is not a task of srun, so `python -m mf_train` in it is one process alone.
    Raises UserError where the variables are incomplete.
    """
    try:
        if "RANK" in environment and "WORLD_SIZE" in environment:
            return Process(
                rank=int(environment["RANK"]),
                world_size=int(environment["WORLD_SIZE"]),
                local_rank=int(environment.get("LOCAL_RANK", "0")),
                master_address=environment["MASTER_ADDR"],
                master_port=int(environment["MASTER_PORT"]),
            )
        if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
            job = int(environment["SLURM_JOB_ID"])
            return Process(
                rank=int(environment["SLURM_PROCID"]),
                world_size=int(environment["SLURM_STEP_NUM_TASKS"]),
                local_rank=int(environment["SLURM_LOCALID"]),
                master_address=environment.get("MASTER_ADDR") or _first_host(environment),
                master_port=int(environment.get("MASTER_PORT", 20000 + job % 20000)),
            )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"environment: {error} is missing or not a number: start with torchrun or srun"
        ) from None
    return Process()


def _first_host(environment: Mapping[str, str]) -> str:
    hosts = environment["SLURM_JOB_NODELIST"]
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"environment: the host of rank 0 in {hosts!r} could not be found ({error}): set MASTER_ADDR"
        ) from None
    return listing.stdout.split()[0]
