"""Which rank is what: one validated answer for every question about parallel degrees."""

from dataclasses import dataclass

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.model.sums import MAX_CHUNKS, num_chunks


@dataclass(frozen=True)
class Degrees:
    """Place of this process. Neighbouring ranks form a tensor-parallel group, so that it stays inside a node."""

    rank: int
    world_size: int
    tensor: int  # P
    local_rank: int = 0  # on its node: the device's index
    node_size: int = 0  # processes of its node; 0: not known

    @property
    def data(self) -> int:
        """R, the data-parallel degree."""
        return self.world_size // self.tensor

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // self.tensor


def count_micro_batches(config: Config, data: int) -> int:
    """Micro-batches of a step, the same number on each of so many data-parallel ranks.

    As few as `training.micro_batch_size` sequences at a time allow the rank with the most sequences.
    """
    return -(-most_rows(config, data) // config.training.micro_batch_size)


def most_rows(config: Config, data: int) -> int:
    """Sequences of a global batch on the data-parallel ranks that have the most; others have one less at most."""
    return -(-config.training.global_batch_size // data)


def check_degrees(config: Config, world_size: int) -> None:
    """Refuse what does not divide, before anything is built. Raises UserError with the numbers."""
    tensor, model = config.parallel.tensor, config.model
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the number of processes {world_size}: "
            f"start {tensor} or a multiple (torchrun --nproc-per-node {tensor} -m mf_train train ...), or change it"
        )
    if tensor > 1:
        _check_tensor(config)
    data = world_size // tensor
    batch, micro = config.training.global_batch_size, config.training.micro_batch_size
    if batch % data or (batch // data) % micro:
        raise UserError(
            f"training.global_batch_size {batch} is not a multiple of training.micro_batch_size {micro} times the "
            f"data-parallel degree {data} ({world_size} processes / parallel.tensor {tensor}): change one of them"
        )
    if config.data.logical_streams % data:
        raise UserError(
            f"data.logical_streams {config.data.logical_streams} is not a multiple of the data-parallel degree {data} "
            f"({world_size} processes / parallel.tensor {tensor}): change the number of processes, or for a new run "
            "data.logical_streams"
        )
    profile = config.training.profile
    if profile.steps and max(profile.ranks) >= world_size:
        raise UserError(
            f"training.profile.ranks names rank {max(profile.ranks)} and the run has ranks 0 to {world_size - 1} "
            f"({world_size} processes): name some of these"
        )
    if model.vocab_size < 2:
        raise UserError(f"model.vocab_size is {model.vocab_size}: it must be at least 2")


def _check_tensor(config: Config) -> None:
    tensor, model = config.parallel.tensor, config.model
    if model.kind == "dense":
        raise UserError(
            f"parallel.tensor is {tensor} and model.kind is dense: the dense peer has no tables to shard; "
            "set parallel.tensor=1"
        )
    if MAX_CHUNKS % tensor:
        raise UserError(f"parallel.tensor is {tensor}: choose 1, 2, 4 or 8")
    for name, value in (
        ("the number of tables (model.hidden_size / model.bits)", model.num_tables),
        ("model.num_heads", model.num_heads),
        ("model.vocab_size", model.vocab_size),
    ):
        if value % tensor:
            raise UserError(
                f"parallel.tensor {tensor} does not divide {name} {value}: choose a divisor or change the model"
            )
    assert num_chunks(model.hidden_size) % tensor == 0 and num_chunks(model.inner_size) % tensor == 0
