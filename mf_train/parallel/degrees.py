"""Which rank is what: one validated answer for every question about parallel degrees."""

from dataclasses import dataclass

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.model.layers import block_layers, tensor_problem
from mf_train.model.sums import num_chunks


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


def rows_of_rank(config: Config, data_rank: int, data: int) -> range:
    """Numbers in the global batch of a data-parallel rank's sequences: as many as of others, or one less."""
    return range(data_rank, config.training.global_batch_size, data)


def count_micro_batches(config: Config, data: int) -> int:
    """Micro-batches of a step, the same number on each of so many data-parallel ranks.

    As few as `training.micro_batch_size` sequences at a time allow the rank with the most sequences.
    """
    return -(-len(rows_of_rank(config, 0, data)) // config.training.micro_batch_size)


def micro_batch_sizes(config: Config, data: int) -> list[int]:
    """Sequences of the micro-batches that any data-parallel rank has, largest first: even parts of its sequences.

    A rank that has fewer sequences than there are micro-batches goes through one of them once more, for nothing.
    """
    parts = count_micro_batches(config, data)
    shares = {len(rows_of_rank(config, rank, data)) for rank in (0, data - 1)}
    return sorted(
        {max(1, size) for rows in shares for size in (rows // parts, -(-rows // parts))}, reverse=True
    )


def check_degrees(config: Config, world_size: int) -> None:
    """Refuse degrees that cannot work, before anything is built. Raises UserError with the numbers."""
    tensor, model = config.parallel.tensor, config.model
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the number of processes {world_size}: "
            f"start {tensor} or a multiple (torchrun --nproc-per-node {tensor} -m mf_train train ...), or change it"
        )
    if problem := tensor_problem(model, tensor, "parallel.tensor"):
        raise UserError(problem)
    data, batch = world_size // tensor, config.training.global_batch_size
    if batch < data:
        raise UserError(
            f"training.global_batch_size {batch} leaves some of {data} data-parallel ranks without a sequence "
            f"({world_size} processes / parallel.tensor {tensor}): start {batch * tensor} processes at most, or for a "
            f"new run raise training.global_batch_size to {data} or more"
        )
    if config.parallel.zero_stage == 3 and config.parallel.master == "split":
        raise UserError(
            "parallel.master is 'split' and parallel.zero_stage is 3, which keeps masters of its own: choose "
            "parallel.zero_stage 0, 1 or 2"
        )
    if config.parallel.zero_stage == 3 and config.optimizer.compact_moments:
        _check_shards(config, data)
    profile = config.training.profile
    if profile.steps and max(profile.ranks) >= world_size:
        raise UserError(
            f"training.profile.ranks names rank {max(profile.ranks)} and the run has ranks 0 to {world_size - 1} "
            f"({world_size} processes): name some of these"
        )
    if model.vocab_size < 2:
        raise UserError(f"model.vocab_size is {model.vocab_size}: it must be at least 2")


def _check_shards(config: Config, data: int) -> None:
    """Under stage 3 a rank's part of a table is so many of its numbers, which must not cut what is held together."""
    model = config.model
    chunks = min(num_chunks(model.hidden_size), num_chunks(model.inner_size)) // config.parallel.tensor
    of_tables = (
        layer.table_entries // layer.out_features for layer in block_layers(model) if layer.table_entries
    )
    for rows in (model.vocab_size, *of_tables):
        if rows * chunks % data:
            raise UserError(
                f"optimizer.table_exp_avg or table_exp_avg_sq is not float32, parallel.zero_stage is 3, and {data} "
                f"data-parallel ranks do not divide {rows} rows into equal parts: choose parallel.zero_stage 1 or "
                "2, or a power of two of ranks"
            )
