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
    local_size: int = 0  # processes of this node; 0: not known


def find_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read torchrun's variables, else those that srun sets for its tasks, else one process alone.

    A batch script is not a task of srun, so `python -m mf_train` in it is one process alone.
    Raises UserError where the variables are incomplete.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Process(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", 0),
            master_address=_text(environment, "MASTER_ADDR"),
            master_port=_number(environment, "MASTER_PORT"),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", 0),
        )
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        return Process(
            rank=_number(environment, "SLURM_PROCID"),
            world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            master_address=environment.get("MASTER_ADDR") or _first_host(environment),
            master_port=_number(
                environment, "MASTER_PORT", 20000 + _number(environment, "SLURM_JOB_ID") % 20000
            ),
            local_size=_number(environment, "SLURM_NTASKS_PER_NODE", 0),
        )
    return Process()


def _text(environment: Mapping[str, str], name: str) -> str:
    if name not in environment:
        raise UserError(f"environment: {name} is missing: start with torchrun or srun, which set it")
    return environment[name]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and name not in environment:
        return default
    text = _text(environment, name)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment: {name} is {text!r}: expected a whole number") from None


def _first_host(environment: Mapping[str, str]) -> str:
    hosts = _text(environment, "SLURM_JOB_NODELIST")
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"environment: the host of rank 0 in {hosts!r} could not be found ({error}): set MASTER_ADDR"
        ) from None
    return listing.stdout.split()[0]
