"""FLOPs, bytes moved and bytes sent in a training step, from the configuration alone: the one place for each count.

Three users: the planner's step time (`planning.time`), a study's cost (`study.cells`), and every step's efficiency in
metrics.jsonl (`step_efficiency`).

FLOPs. The paper counts a multiply-add as 1 and the forward pass of the blocks alone (Table 1, `model.counts`):
`paper_flops`. `model_flops` are those of training: the blocks and the LM head, 2 for a multiply and an add, times 3 for
the forward pass and the backward pass's two products; so 6 for each multiply-add. Both count attention's whole square,
as the paper does. `PartWork.flops` are what a device computes: half of that square, once more in the backward pass, and
of a lookup nothing, since its time is that of its bytes. Other kinds of attention: `model.attention.costs`.

Bytes moved. Each part counts what its kernel reads and writes in the memory of its device, activations included. A
table row is counted for every token that reads it, also where a cache serves it; tables and matrices in whole passes
once a micro-batch. It is a count, not a measurement: no hardware counter is read.

Bytes sent by a rank are those of a ring: of an all-gather or a reduce-scatter of M bytes a rank sends (R - 1) / R of M,
of an all-reduce twice that. Collectives of single numbers (the loss, the gradient's norm) are left out.
"""

from dataclasses import dataclass
from typing import NamedTuple

from mf_train.config import Config, ModelConfig
from mf_train.config.phases import phases_of
from mf_train.model.attention.costs import attention_costs
from mf_train.model.counts import count_block_flops, count_parameters
from mf_train.model.layers import (
    block_layers,
    block_norms,
    block_places,
    count_matrices,
    gathered_features,
    hashed_features,
    product_codes,
    rank_features,
    rotated_features,
)
from mf_train.model.sums import num_chunks
from mf_train.parallel.degrees import count_micro_batches
from mf_train.planning.device_memory import LIVE, average_bytes, code_bytes, moment_bytes
from mf_train.planning.devices import Peak

TRAINING_FLOPS = 6  # for each multiply-add of the forward pass: 2 for multiply and add, 3 for the passes
# What the update of a number that is not held in float32 computes beside: so many bytes in addition would take as long
# (benchmarks.moments on a CPU, where they add up within a fifth). A split master alone is updated in torch operations.
_HELD_BYTES = {"float32": 0, "split": 5, "row": 10, "bfloat16": 10, "int8": 56}
_SPLIT_ALONE_BYTES = 92
# the norm reads gradients, clipping reads and writes them; masters are read and written as parameters
_AROUND_ADAM_BYTES = 4 + 2 * 4 + 4


@dataclass(frozen=True)
class PartWork:
    """A part of a step on one rank: bytes in long passes, bytes of table rows, FLOPs of products, operations.

    `host`: bytes in long passes in the host's memory, or to it.
    """

    name: str
    copy: float = 0
    host: float = 0
    gather: float = 0
    flops: float = 0
    launches: float = 0


class RunWork(NamedTuple):
    """What a run costs, of all ranks together."""

    tokens: int
    flops: float  # `model_flops`
    bytes_moved: float  # `step_bytes`


def paper_flops(model: ModelConfig) -> float:
    """Multiply-adds of a token in the forward pass of all blocks, as in Table 1 of the paper; no LM head."""
    return model.num_layers * count_block_flops(model).total / model.sequence_length


def model_flops(model: ModelConfig) -> float:
    """FLOPs of a token in training: blocks and LM head, 6 for each multiply-add of the forward pass."""
    return TRAINING_FLOPS * (paper_flops(model) + model.vocab_size * model.hidden_size)


def step_tokens(config: Config) -> int:
    """Tokens of one step, of all ranks."""
    return config.training.global_batch_size * config.model.sequence_length


def step_bytes(config: Config) -> float:
    """Bytes that a step moves, of all ranks together: all parts of `block_work`, and one update.

    What parallel degrees add is left out (copies of gradients, codes on each tensor-parallel rank, an update on each
    rank under ZeRO 0), so that two layouts of one run have the same bytes.
    """
    micro_batches = config.training.global_batch_size / config.training.micro_batch_size
    once = sum(work.copy + work.gather for work in micro_batch_work(config, 1))
    return micro_batches * once + update_work(config, count_parameters(config.model).total).copy


def run_work(config: Config) -> RunWork:
    """Of all steps of a run, through its phases."""
    each = [(phase.num_steps, phase.config) for phase in phases_of(config)]
    return RunWork(
        tokens=sum(steps * step_tokens(here) for steps, here in each),
        flops=float(sum(steps * step_tokens(here) * model_flops(here.model) for steps, here in each)),
        bytes_moved=float(sum(steps * step_bytes(here) for steps, here in each)),
    )


def micro_batch_work(config: Config, tensor: int) -> list[PartWork]:
    """Forward and backward pass of one micro-batch on one of `tensor` ranks."""
    model = config.model
    b = element_bytes(config)
    n = config.training.micro_batch_size * model.sequence_length
    size = model.hidden_size / tensor
    logits = n * model.vocab_size / tensor
    features = _normed(model) / tensor
    layers = model.num_layers
    return [
        _attention(model, n, b, tensor),
        *_memory_work(model, n, b, tensor),
        *_matrix_work(model, n, b, tensor),
        # of each norm's features 8 passes in both directions, residual sums and their gradients 8
        PartWork("norms and sums", copy=layers * n * (features * 8 + size * 8) * b, launches=layers * 20),
        PartWork("head", copy=3 * logits * b, flops=TRAINING_FLOPS * logits * model.hidden_size, launches=6),
        # read for the sums; read, and overwritten by their gradient; with a cap read and written once more
        PartWork("loss", copy=(5 if model.logit_softcap else 3) * logits * b, launches=12),
        PartWork("embedding", copy=4 * n * size * b + 2 * model.vocab_size * size * b, launches=4),
    ]


def _attention(model: ModelConfig, n: float, b: int, tensor: int) -> PartWork:
    """Of all blocks (`attention.costs`).

    Where q and k are normalised, each is read and written twice forward, and in 6 passes backward.
    """
    costs = attention_costs(model)
    moved = sum(cost.numbers * b + cost.sums * 4 for cost in costs)
    normalised = 20 * len(costs) * model.hidden_size * b if model.qk_norm else 0
    return PartWork(
        "attention",
        copy=n / tensor * (moved + normalised),
        flops=2 * n / tensor * sum(cost.computed * cost.passes for cost in costs),
        launches=sum(cost.launches for cost in costs),
    )


def _normed(model: ModelConfig) -> int:
    """Features that the norms of a block read, and GELU in an FFN of matrices."""
    gelu = 0 if model.ffn_kind == "memory" else model.inner_size
    return sum(features for features, _ in block_norms(model)) + gelu


def _rows(model: ModelConfig, n: float, b: int, tensor: int) -> float:
    """Bytes of table rows that the lookups of all blocks read."""
    columns = sum(layer.rows_read * layer.out_features for layer in block_layers(model))
    return model.num_layers * n * columns / tensor * b


def _memory_work(model: ModelConfig, n: float, b: int, tensor: int) -> list[PartWork]:
    tables = count_parameters(model).tables / tensor * b
    if not tables:
        return []
    layers = model.num_layers
    rows = _rows(model, n, b, tensor)
    hashed = n * hashed_features(model) / tensor * b
    hashes = layers * (3 * hashed + 2 * n * code_bytes(model, b) / tensor)
    return [
        # launches: tests/kernels/test_launches.py
        PartWork("hash", copy=hashes, launches=layers * 9),
        PartWork("lookup", copy=tables, gather=rows, launches=layers * 5),
        # the output's gradient for each row that was read; tables read and their gradients written
        PartWork("lookup backward", copy=2 * tables, gather=rows, launches=layers * 54),
    ]


def _matrix_features(model: ModelConfig, tensor: int) -> float:
    """Inputs, gathered, and results of the matrices of a block, features a token."""
    layers = [layer for layer in block_layers(model) if layer.matrices]
    found = sum(
        layer.in_features + layer.out_features / tensor + layer.rank * (1 + 1 / tensor) for layer in layers
    )
    return found + 2 * rotated_features(model) / tensor


def _matrix_work(model: ModelConfig, n: float, b: int, tensor: int) -> list[PartWork]:
    dense = count_parameters(model).dense / tensor
    if not dense:
        return []
    # matrices read, read, gradient written; inputs and results forward, and twice backward
    copied = 3 * dense * b + 3 * model.num_layers * n * _matrix_features(model, tensor) * b
    launches = model.num_layers * (2 + 3 * count_matrices(model))
    return [PartWork("dense layers", copy=copied, flops=TRAINING_FLOPS * n * dense, launches=launches)]


def recomputed_work(config: Config, tensor: int) -> list[PartWork]:
    """The blocks' forward pass of a micro-batch once more, where `training.recompute` asks for it.

    No part of `step_bytes`: recomputation is a matter of layout, as in model FLOPs utilisation.
    """
    model = config.model
    if config.training.recompute == "none":
        return []
    b = element_bytes(config)
    n = config.training.micro_batch_size * model.sequence_length
    layers, size = model.num_layers, model.hidden_size / tensor
    costs = attention_costs(model)
    moved = sum(cost.forward * (cost.numbers * b + cost.sums * 4) for cost in costs)
    parts = [
        PartWork(
            "attention again",
            copy=n / tensor * moved + (layers * n * size * b * 8 if model.qk_norm else 0),
            flops=2 * n / tensor * sum(cost.computed for cost in costs),
            launches=sum(cost.launches for cost in costs) / 2,
        ),
        # norms read and written, and residual sums
        PartWork(
            "norms again",
            copy=layers * n * (2 * _normed(model) / tensor + 3 * size) * b,
            launches=layers * 8,
        ),
    ]
    counts = count_parameters(model)
    if counts.tables:
        hashed = layers * n * (hashed_features(model) * b + code_bytes(model, b)) / tensor
        parts += [
            PartWork("hash again", copy=hashed, launches=layers * 3),
            PartWork(
                "lookup again",
                copy=counts.tables / tensor * b,
                gather=_rows(model, n, b, tensor),
                launches=layers * 5,
            ),
        ]
    if counts.dense:
        copied = counts.dense / tensor * b + layers * n * _matrix_features(model, tensor) * b
        flops, launches = 2 * n * counts.dense / tensor, layers * (1 + count_matrices(model))
        parts.append(PartWork("dense layers again", copy=copied, flops=flops, launches=launches))
    return parts


def update_work(config: Config, parameters: float) -> PartWork:
    """Norm, clipping, AdamW and the new parameters, of as many parameters as a rank updates."""
    # AdamW reads master, gradient and both moments, and writes all but the gradient
    adam = 4 + 2 * (4 + moment_bytes(config))
    weights = 0 if config.parallel.master == "split" else element_bytes(config)  # else part of the master
    # the average is read and written, and the master read once more
    moved = adam + _AROUND_ADAM_BYTES + weights + 3 * average_bytes(config)
    return PartWork("update", copy=parameters * moved, launches=100)


def held_work(config: Config, parameters: float) -> PartWork:
    """What an update takes longer for numbers that are not held in float32, as bytes; no part of `step_bytes`."""
    optimizer = config.optimizer
    kinds = (config.parallel.master, optimizer.table_exp_avg, optimizer.table_exp_avg_sq)
    each = sum(_HELD_BYTES[kind] for kind in kinds)
    if config.parallel.master == "split" and not optimizer.compact_moments:
        each = _SPLIT_ALONE_BYTES
    return PartWork("update of compact numbers", copy=parameters * each)


def gradient_copies(config: Config, data: int, *, cuda: bool) -> PartWork:
    """Passes over a micro-batch's gradients beside the collectives."""
    counts, tensor = count_parameters(config.model), config.parallel.tensor
    n = counts.total / tensor
    b = element_bytes(config)
    if (
        config.parallel.zero_stage < 3
    ):  # read, and added to float32 sums; stage 2 adds reduced ones to a shard's
        passes = (b + 8) * n + (12 * n / data if config.parallel.zero_stage == 2 else 0)
        if cuda:  # lookups add to the sums: tables' gradients are not written, as they were counted, nor read
            passes -= 2 * b * counts.tables / tensor
    else:  # into the bucket, divided, put in the ranks' order, then to the partition, twice
        passes = 6 * b * n + (2 * b + 8) * n / data
    return PartWork("gradient copies", copy=passes, launches=100)


def element_bytes(config: Config) -> int:
    """Bytes of a parameter or an activation as the forward pass reads it."""
    return 2 if config.training.precision == "bfloat16" else 4


def data_parallel_bytes(config: Config, data: int) -> dict[str, float]:
    """By purpose, of one rank in one step: gradients in `parallel.reduce_dtype`, parameters in their own dtype.

    Stages 0 and 1 reduce gradients once a step, stages 2 and 3 for each micro-batch, by reduce-scatter. Stage 0 gathers
    the float32 sums. Stages 1 and 2 gather parameters after the update, stage 3 for each micro-batch, and again for the
    backward pass where a rank's share of the model is too large to stay gathered (stage3_max_live_parameters; then this
    is an upper bound). tests/planning/test_work.py counts the collectives.
    """
    if data == 1:
        return {}
    stage, times = config.parallel.zero_stage, count_micro_batches(config, data)
    shares = count_parameters(config.model).total / config.parallel.tensor * (data - 1) / data
    reduced = shares * (2 if config.parallel.reduce_dtype == "bfloat16" else 4)
    gathered = shares * element_bytes(config)
    if stage == 0:
        return {"reduce gradients": reduced, "gather gradients": 4 * shares}
    if stage == 3:
        gathered *= times * (
            1 if count_parameters(config.model).total / config.parallel.tensor <= LIVE else 2
        )
    return {"reduce gradients": reduced * (times if stage > 1 else 1), "gather parameters": gathered}


def data_parallel_bytes_per_token(config: Config, data: int) -> float:
    """For each token that a data-parallel rank trains on."""
    return sum(data_parallel_bytes(config, data).values()) / (step_tokens(config) / data)


def tensor_parallel_bytes_per_token(config: Config) -> float:
    """What is hashed: codes and weights, and the weights' gradients; what matrices read: features, and their gradients;
    sums of norms, features before the head and their gradient, three values of the loss a chunk of the vocabulary.
    Gradients travel in float32. `parallel.exchange` counts the same while it sends.
    """
    model, tensor = config.model, config.parallel.tensor
    if tensor == 1:
        return 0
    b = element_bytes(config)
    # a code travels in one byte, or in two
    codes = [1 if place.bits <= 8 else 2 for place in block_places(model) if place.hashed]
    hashed = model.num_tables * sum(code + b + 4 for code in codes)
    reads, code = product_codes(model)
    hashed += reads * ((2 if code == 4 else code) + b + 4)
    gathered = (gathered_features(model) + rank_features(model)) * (b + 4)
    shared = model.num_layers * (hashed + gathered)
    shared += model.hidden_size * (b + 4) + num_chunks(model.vocab_size) * 3 * 4
    sums = (len(block_norms(model)) * model.num_layers + 1) * (2 + 2) * 4  # whole on each rank
    return (tensor - 1) / tensor * shared + (tensor - 1) * sums


def step_efficiency(
    config: Config, processes: int, peak: Peak | None, seconds: float
) -> dict[str, float | None]:
    """Keys of metrics.jsonl for a step of `seconds`, of all ranks together.

    `paper_flops`: multiply-adds of the blocks' forward pass, as Table 1 counts them. `model_flops`: FLOPs of training,
    blocks and LM head, 6 for each multiply-add. `bytes_moved`: of memory, counted by `planning.work.step_bytes`.
    `flops_share` and `bandwidth_share`: of the devices' peak (data sheet, `find_peak`); None where that is not known,
    as for every CPU. Rows are counted each time they are read, so a cache that serves them raises `bandwidth_share`,
    in the extreme above 1. `data_parallel_bytes_per_token`: what a rank sends for each of its tokens, computed.
    """
    tokens, model = step_tokens(config), config.model
    flops, moved = tokens * model_flops(model), step_bytes(config)
    device_seconds = processes * seconds
    data = processes // config.parallel.tensor
    return {
        "paper_flops": tokens * paper_flops(model),
        "model_flops": flops,
        "bytes_moved": moved,
        "flops_share": flops / device_seconds / peak.flops[config.training.precision] if peak else None,
        "bandwidth_share": moved / device_seconds / peak.memory if peak else None,
        "data_parallel_bytes_per_token": data_parallel_bytes_per_token(config, data),
    }
