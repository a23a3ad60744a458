"""Which process this is: alone, one of torchrun's, or one of srun's."""

import os
import re
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
        if restarts := _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0):
            raise UserError(
                f"torchrun --max-restarts={restarts}: what a failed start leaves in torchrun's store would end the "
                "next one; leave the option out, and start the same command again, which resumes"
            )
        return Process(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", 0),
            master_address=_text(environment, "MASTER_ADDR"),
            master_port=_number(environment, "MASTER_PORT"),
            local_size=_number(environment, "LOCAL_WORLD_SIZE", 0),
        )
    if "SLURM_STEP_NUM_TASKS" in environment and "SLURM_PROCID" in environment:
        tasks = _number(environment, "SLURM_STEP_NUM_TASKS")
        if tasks == 1:  # others may train on the node beside it, each at a port of its own
            return Process()
        # steps beside each other in a job have ports of their own, too
        number = _number(environment, "SLURM_JOB_ID") + 101 * _number(environment, "SLURM_STEP_ID", 0)
        nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
        return Process(
            rank=_number(environment, "SLURM_PROCID"),
            world_size=tasks,
            local_rank=_number(environment, "SLURM_LOCALID"),
            master_address=environment.get("MASTER_ADDR") or _first_host(_text(environment, nodes)),
            master_port=_number(environment, "MASTER_PORT", 20000 + number % 20000),
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


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes (`rack[0-1]n[08-11],login`), read here: a container may lack scontrol."""
    entry = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodes)
    if entry is None:
        raise UserError(
            f"environment: SLURM's list of nodes is {nodes!r}: set MASTER_ADDR to the host of rank 0"
        )
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", entry[0])
