"""What a cell costs, from its configuration alone: parameters, tokens, training FLOPs, bytes moved."""

from __future__ import annotations

from dataclasses import dataclass

from mf_train.config import Config
from mf_train.model.counts import count_parameters
from mf_train.planning.work import model_flops, step_bytes, step_tokens


@dataclass(frozen=True)
class Cost:
    """Size and cost of one run."""

    parameters: int  # all
    table_parameters: int
    block_parameters: int  # without embedding and LM head
    tokens: int
    flops: float  # training FLOPs: `planning.work.model_flops`, the LM head's among them
    bytes_moved: float  # see `planning.work.step_bytes`


def run_cost(config: Config) -> Cost:
    """Cost of all steps of a run."""
    counts = count_parameters(config.model)
    tokens = config.training.steps * step_tokens(config)
    return Cost(
        parameters=counts.total,
        table_parameters=counts.tables,
        block_parameters=counts.total - counts.embedding - counts.head,
        tokens=tokens,
        flops=float(tokens * model_flops(config.model)),
        bytes_moved=float(config.training.steps * step_bytes(config)),
    )
