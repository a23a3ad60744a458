"""What a cell costs, from its configuration alone: parameters, tokens, training FLOPs, bytes of parameters moved."""

from __future__ import annotations

from dataclasses import dataclass

from mf_train.config import Config
from mf_train.model.counts import count_block_flops, count_parameters

# Two for a multiply and an add, three for the forward pass and the two products of the backward pass.
_TRAINING_FLOPS_A_MULTIPLY_ADD = 6
# A parameter that is used: read forward, read backward, and its gradient's sum read and written.
_TOUCHES = 4
# AdamW in float32: reads weight, gradient and both moments, writes weight and both moments.
_UPDATE_BYTES = 7 * 4


@dataclass(frozen=True)
class Cost:
    """Size and cost of one run."""

    parameters: int  # all
    table_parameters: int
    block_parameters: int  # without embedding and LM head
    tokens: int
    flops: float  # training FLOPs: 6 for each multiply-add of the forward pass as the paper counts them
    bytes_moved: float  # of parameters and their gradients, see `step_bytes`


def run_cost(config: Config) -> Cost:
    """Cost of all steps of a run."""
    counts = count_parameters(config.model)
    tokens = config.training.steps * step_tokens(config)
    return Cost(
        parameters=counts.total,
        table_parameters=counts.tables,
        block_parameters=counts.total - counts.embedding - counts.head,
        tokens=tokens,
        flops=float(tokens * token_flops(config)),
        bytes_moved=float(config.training.steps * step_bytes(config)),
    )


def step_tokens(config: Config) -> int:
    """Tokens of one step."""
    return config.training.global_batch_size * config.model.sequence_length


def token_flops(config: Config) -> float:
    """Training FLOPs of a token: blocks and LM head. Table 1's count of the blocks, times 6."""
    model = config.model
    sequence = model.num_layers * count_block_flops(model).total
    head = model.hidden_size * model.vocab_size
    return _TRAINING_FLOPS_A_MULTIPLY_ADD * (sequence / model.sequence_length + head)


def step_bytes(config: Config) -> float:
    """Bytes of parameters and gradients that a step of one process moves between memory and processor at least.

    Table rows and embedding rows once for each token that reads them, matrices once a micro-batch, all parameters once
    for the update. Activations are left out.
    """
    model = config.model
    counts = count_parameters(model)
    size = 2 if config.training.precision == "bfloat16" else 4
    tokens = step_tokens(config)
    micro_batches = config.training.global_batch_size / config.training.micro_batch_size
    rows = model.hidden_size  # the embedding's
    if model.kind == "memoryformer":
        rows += model.num_layers * model.num_tables * (4 * model.hidden_size + model.inner_size)
    matrices = counts.dense + counts.head + counts.small
    used = tokens * rows + micro_batches * matrices
    return _TOUCHES * size * used + _UPDATE_BYTES * counts.total
