"""Bytes and FLOPs of a training step, from the configuration alone: the one place where they are counted.

Three users: the planner's step time (`planning.time`), a study's cost (`study.cells`), and every step's efficiency in
metrics.jsonl (`planning.efficiency`).

FLOPs. The paper counts a multiply-add as 1 and the forward pass of the blocks alone (Table 1, `model.counts`):
`paper_flops`. `model_flops` are those of training: the blocks and the LM head, 2 for a multiply and an add, times 3 for
the forward pass and the backward pass's two products; so 6 for each multiply-add. Both count attention's whole square,
as the paper does. `Work.flops` are what a device computes: half of that square, once more in the backward pass, and of
a lookup nothing, since its time is that of its bytes.

Bytes. Each part counts what its kernel reads and writes in the memory of its device, activations included. A table row
is counted for every token that reads it, also where a cache serves it; tables and matrices in whole passes once a
micro-batch. It is a count, not a measurement: no hardware counter is read.
"""

from dataclasses import dataclass

from mf_train.config import Config, ModelConfig
from mf_train.model.counts import count_block_flops, count_parameters
from mf_train.planning.memory import code_bytes, loss_bytes

TRAINING_FLOPS = 6  # for each multiply-add of the forward pass: 2 for multiply and add, 3 for the passes
_CAUSAL = 1 / 2  # of attention's square is below the diagonal
_ATTENTION_PASSES = 7 / 2  # 2 products forward, 5 backward (Dao 2023, arXiv 2307.08691)
_LOOKUP_PASSES = 2  # backward: rows for the weights' gradient, and the output's gradient for each table
# AdamW in float32: reads weight, gradient and both moments, writes all but the gradient
_ADAM_BYTES = 7 * 4
# the norm reads gradients, clipping reads and writes them; masters are read and written as parameters
_AROUND_ADAM_BYTES = 4 + 2 * 4 + 4


@dataclass(frozen=True)
class Work:
    """A part of a step on one rank: bytes in long passes, bytes of table rows, FLOPs of products, operations."""

    name: str
    copy: float = 0
    gather: float = 0
    flops: float = 0
    launches: float = 0


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
    rank under ZeRO 0), so that two layouts of one run have the same bytes. The loss is counted as one fused pass.
    """
    micro_batches = config.training.global_batch_size / config.training.micro_batch_size
    once = sum(work.copy + work.gather for work in micro_batch_work(config, 1, "cpu"))
    return micro_batches * once + update_work(config, count_parameters(config.model).total).copy


def micro_batch_work(config: Config, tensor: int, kind: str) -> list[Work]:
    """Forward and backward pass of one micro-batch on one of `tensor` ranks; `kind` "cpu" or "cuda"."""
    model = config.model
    b = element_bytes(config)
    n = config.training.micro_batch_size * model.sequence_length
    size = model.hidden_size / tensor
    logits = n * model.vocab_size / tensor
    features = 2 * size + (4 * size if model.kind == "dense" else model.inner_size / tensor)
    layers = model.num_layers
    return [
        *(_dense_work if model.kind == "dense" else _memory_work)(model, n, b, tensor),
        # of each norm's features 8 passes in both directions, residual sums and their gradients 8
        Work("norms and sums", copy=layers * n * (features * 8 + size * 8) * b, launches=layers * 20),
        Work("head", copy=3 * logits * b, flops=TRAINING_FLOPS * logits * model.hidden_size, launches=6),
        Work("loss", copy=2 * logits * loss_bytes(b, kind), launches=12),
        Work("embedding", copy=4 * n * size * b + 2 * model.vocab_size * size * b, launches=4),
    ]


def _attention(model: ModelConfig, n: float, b: int, tensor: int) -> Work:
    """q, k, v and the result, forward; these, their gradients and the rotation's copies, backward: 12 passes."""
    layers = model.num_layers
    products = layers * count_block_flops(model).attention / model.sequence_length * n / tensor
    return Work(
        "attention",
        copy=layers * n * model.hidden_size / tensor * b * 12,
        flops=2 * _CAUSAL * _ATTENTION_PASSES * products,
        launches=layers * 12,
    )


def _memory_work(model: ModelConfig, n: float, b: int, tensor: int) -> list[Work]:
    layers, size, inner = model.num_layers, model.hidden_size / tensor, model.inner_size / tensor
    rows = layers * n * model.num_tables * (3 * size + inner + size) * b  # of all five lookups
    tables = count_parameters(model).tables / tensor * b
    hashed = n * (2 * size + inner) * b
    hashes = layers * (3 * hashed + 2 * n * code_bytes(model, b) / tensor)
    return [
        _attention(model, n, b, tensor),
        Work("hash", copy=hashes, launches=layers * 6),
        Work("lookup", copy=tables, gather=rows, launches=layers * 6),
        # gradients of tables written, then read and written where they are summed
        Work("lookup backward", copy=3 * tables, gather=_LOOKUP_PASSES * rows, launches=layers * 12),
    ]


def _dense_work(model: ModelConfig, n: float, b: int, tensor: int) -> list[Work]:
    layers, size = model.num_layers, model.hidden_size / tensor
    products = layers * count_block_flops(model).layers / model.sequence_length * n / tensor
    matrices = 3 * count_parameters(model).dense / tensor * b  # read, read, gradient written
    # inputs and results of six layers, 18 features' width; forward, and twice backward
    features = 3 * 18 * layers * n * size * b
    dense = Work(
        "dense layers", copy=matrices + features, flops=TRAINING_FLOPS * products, launches=layers * 20
    )
    return [_attention(model, n, b, tensor), dense]


def update_work(config: Config, parameters: float) -> Work:
    """Norm, clipping, AdamW and the new parameters, of as many parameters as a rank updates."""
    moved = _ADAM_BYTES + _AROUND_ADAM_BYTES + element_bytes(config)
    return Work("update", copy=parameters * moved, launches=100)


def gradient_copies(config: Config, data: int) -> Work:
    """Passes over a micro-batch's gradients beside the collectives (the copies that `planning.memory` counts)."""
    n = count_parameters(config.model).total / config.parallel.tensor
    stage, bfloat16 = config.parallel.zero_stage, config.training.precision == "bfloat16"
    b = element_bytes(config)
    if stage == 0:  # flattened, divided, copied back; in bfloat16 checked and turned to float32
        passes = 6 * b * n + (8 * n if bfloat16 else 0)
    elif stage == 1 and bfloat16:
        # added to float32 sums, flattened, to bfloat16 and back, copied back, cleared
        passes = (10 + 8 + 6 + 6 + 8 + 4 + 2) * n
    else:  # into the bucket, divided, flattened or put in the ranks' order, then to the partition, twice
        passes = 6 * b * n + (2 * b + 8) * n / data
    return Work("gradient copies", copy=passes, launches=100)


def element_bytes(config: Config) -> int:
    """Bytes of a parameter or an activation as the forward pass reads it."""
    return 2 if config.training.precision == "bfloat16" else 4
