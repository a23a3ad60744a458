"""Bytes that one rank needs in training, from the configuration alone.

A step has three moments that can be its peak; the plan's is the largest of them:

    loss      all activations are kept, logits and their gradient exist, few gradients do
    reduce    the backward pass is over: all gradients exist, and the buffers that they are averaged in
    update    AdamW runs: gradients in float32 beside the masters and moments

What exists at each is that of `parallel.zero` and, under stage 3, of DeepSpeed 0.19.8, read in its sources;
`benchmarks.plan_memory` checks it. n is the number of a tensor-parallel rank's parameters, R the data-parallel degree.
"""

from dataclasses import dataclass

from mf_train.config import Config, ModelConfig
from mf_train.config.phases import Phase, phases_of
from mf_train.errors import UserError
from mf_train.model.attention.costs import attention_costs
from mf_train.model.counts import count_parameters
from mf_train.model.layers import (
    block_layers,
    block_norms,
    block_places,
    gathered_features,
    product_codes,
    rank_features,
    rotated_features,
)
from mf_train.model.sums import num_chunks
from mf_train.parallel.degrees import check_degrees, count_micro_batches, micro_batch_sizes
from mf_train.parallel.kinds import PIECE, held_bytes

LIVE = 1_000_000_000  # elements that stage 3 keeps gathered, or a larger table: stage3_max_live_parameters
# Beside tensors. On a CPU: Python with torch and DeepSpeed (LIBRARIES, as resident before a model is built), and
# scratch; on a GPU: context, cuBLAS, NCCL.
LIBRARIES = 0.53e9
PROCESS = {"cpu": LIBRARIES + 15e6, "cuda": 1.0e9}
# pieces of numbers held in fewer bytes that an update has in float32, with what comes beside (`parallel.stored`)
_SCRATCH = {device: 10 * 4 * numbers for device, numbers in PIECE.items()}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: what stays between steps, what a step adds, and its peak."""

    parameters: float  # as the forward pass reads them
    optimizer: float  # masters, where they are apart, moments, average; 0 on a GPU where they are in the host's memory
    gradients: float  # those that all micro-batches are summed in
    activations: float  # kept for the backward pass of one micro-batch, codes and weights included
    codes: float  # of these: codes and weights of the hashes
    logits: float  # logits, their gradient and what the loss takes beside them
    buffers: float  # communication: buckets and flat copies, at the moment `reduce`
    process: float
    peaks: dict[str, float]  # at each moment
    host: float  # of a GPU's host: a copy of the state that is saved beside the steps, and what is offloaded

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


@dataclass(frozen=True)
class _States:
    """Bytes a stage holds: between steps, and in addition at the step's moments."""

    parameters: float
    optimizer: float
    host: float  # of a GPU's host
    gradients: float
    gathered: float  # stage 3: whole parameters while the loss is computed
    early: float  # buffers that exist from the backward pass's begin
    reduce: float  # gradients and buffers at the end of the backward pass
    update: float


def estimate_memory(config: Config, processes: int, device: str = "cuda") -> RankMemory:
    """Memory of a rank of `processes`; `device` "cpu" or "cuda". The degrees must have passed `check_degrees`."""
    model, tensor = config.model, config.parallel.tensor
    data = processes // tensor
    micro = micro_batch_sizes(config, data)[0]
    recompute = config.training.recompute == "block"
    n = count_parameters(model).total / tensor  # every parameter is split
    states = _states(config, n, data, device)
    tokens = micro * model.sequence_length
    width = 2 if config.training.precision == "bfloat16" else 4
    coded = code_bytes(model, width) if not recompute or tensor > 1 else 0
    codes = tokens * model.num_layers * coded
    block = tokens * block_bytes(model, tensor, width)
    layers = model.num_layers * (
        tokens * recomputed_block_bytes(model, tensor, width) if recompute else block
    )
    # the final norm's two, gathered features, and int64 tokens and targets
    ends = tokens * (2 * model.hidden_size // tensor * width + (tensor > 1) * model.hidden_size * width + 24)
    kept = layers + ends
    logits = tokens * model.vocab_size / tensor * width  # and then their gradient, in the same memory
    work = tokens * working_bytes(model, tensor, width)
    last = tokens * model.hidden_size / tensor * width  # the embedding's gradient
    if recompute:
        # all activations of the block whose gradients are computed, but for its input, which is kept, and that of a
        # last layer of matrices, which is freed before the others' gradients exist
        freed = model.hidden_size + (0 if model.ffn_kind == "memory" else model.inner_size)
        work += block - tokens * freed / tensor * width
        last = work
    process = PROCESS[device]
    fixed = states.parameters + states.optimizer + states.gradients + process
    peaks = {
        "loss": fixed + states.gathered + states.early + kept + max(logits, work),
        "reduce": fixed + states.reduce + last,
        "update": fixed + states.update,
    }
    saves_beside = config.checkpoint.interval and config.checkpoint.asynchronous
    return RankMemory(
        parameters=states.parameters,
        optimizer=states.optimizer,
        gradients=states.gradients,
        activations=kept,
        codes=codes,
        logits=logits,
        buffers=states.reduce,
        process=process,
        peaks=peaks,
        # each rank writes its own share: checkpoint/save.py
        host=states.host
        + (
            (_weight_bytes(config) + _master_bytes(config) + moment_bytes(config) + average_bytes(config))
            * n
            / data
            if saves_beside
            else 0
        ),
    )


def offloaded_bytes(config: Config, processes: int) -> float:
    """What `parallel.offload` has in host memory for a rank: masters, moments, average, and the gradients."""
    if config.parallel.offload == "none":
        return 0
    tensor = config.parallel.tensor
    n = count_parameters(config.model).total / tensor
    # a split master has its weight beside it, and so 4 bytes too
    return (4 + moment_bytes(config) + average_bytes(config) + 4) * _owned(config, n, processes // tensor)


def peak_bytes(config: Config, processes: int, device: str | None = None) -> float:
    """Peak memory of a rank. `device` None: as `training.device`, where auto counts as a CPU, which takes less."""
    kind = device or ("cuda" if config.training.device == "cuda" else "cpu")
    return estimate_memory(config, processes, kind).peak


def heaviest_phase(config: Config, processes: int, device: str | None = None) -> Phase:
    """The phase of a run with the highest `peak_bytes` of those whose degrees can work; the first of equals."""

    def peak(phase: Phase) -> float:
        try:
            check_degrees(phase.config, processes)
        except UserError:
            return 0.0
        return peak_bytes(phase.config, processes, device)

    return max(phases_of(config), key=peak)


def code_bytes(model: ModelConfig, width: int) -> int:
    """Codes and weights that one block keeps, bytes a token: those of all K tables, or heads, on every rank."""
    hashed = [place for place in block_places(model) if place.hashed]
    reads, code = product_codes(model)
    return sum(model.num_tables * (_code(place.bits) + width) for place in hashed) + reads * (code + width)


def block_bytes(model: ModelConfig, tensor: int, width: int) -> float:
    """What one block keeps for its backward pass, bytes a token of a rank.

    The inputs of both norms, what hashes or matrices read, q, k and v after the rotation, attention's result, the
    inner norm's or GELU's input and output, codes with weights, two float32 statistics of each norm, a softmax
    normaliser a head. With `model.qk_norm` q and k before and after their norm as well, and a float32 statistic a head.
    Matrices keep the features of all ranks, and what lies between those of low rank. What other kinds of attention keep
    (`attention.costs`) is the mean of the blocks.
    """
    size, heads = model.hidden_size / tensor, model.num_heads / tensor
    normalised = 4 * size * width + 2 * 4 * heads if model.qk_norm else 0
    costs = attention_costs(model)
    kept = sum(cost.kept_numbers * width + cost.kept_sums * 4 for cost in costs) / len(costs) / tensor
    inner = model.inner_size / tensor
    activation = inner * width if model.ffn_kind == "memory" and model.ffn_activation == "gelu" else 0
    output = size * width if model.output_kind == "memory" else 0  # of its norm
    others = gathered_features(model) * (1 - 1 / tensor) * width
    own = activation + normalised + output + others + rank_features(model) * width + code_bytes(model, width)
    own += (
        _product_bytes(model, tensor)[0] + rotated_features(model) / tensor * width
    )  # beside what is turned
    return (8 * size + 2 * inner) * width + own + len(block_norms(model)) * 8 + 4 * heads + kept


def _product_bytes(model: ModelConfig, tensor: int) -> tuple[float, float]:
    """Of a product-key memory, bytes a token of a rank: what it keeps, and what its backward pass holds at once.

    It keeps queries before and after their norm, the places of the best half keys and pairs, and the softmax.
    """
    if model.ffn_kind != "product_key":
        return 0.0, 0.0
    d, k, n = model.product_query, model.product_reads, model.product_keys
    heads = model.product_heads / tensor
    return heads * (8 * d + 16 * k + 24 * k + 4 * k), heads * 8 * (2 * n + k * k)


def recomputed_block_bytes(model: ModelConfig, tensor: int, width: int) -> float:
    """What a block keeps whose activations are computed again, bytes a token of a rank: its input and what it received.

    Received: codes with weights, features that matrices read, and for each norm two float32 sums of every rank.
    """
    received = code_bytes(model, width) + (gathered_features(model) + rank_features(model)) * width
    received += len(block_norms(model)) * 2 * 4 * tensor
    received = received if tensor > 1 else 0
    return model.hidden_size / tensor * width + received


def working_bytes(model: ModelConfig, tensor: int, width: int) -> float:
    """Gradients that a block's backward pass holds at once, bytes a token of a rank."""
    gradients = (4 * model.hidden_size + 2 * model.inner_size) / tensor * width
    return gradients + _product_bytes(model, tensor)[1]


def _states(config: Config, n: float, data: int, device: str) -> _States:
    stage, bfloat16 = config.parallel.zero_stage, config.training.precision == "bfloat16"
    largest = _largest_parameter(config.model) / config.parallel.tensor
    bucket = min(n, max(config.parallel.bucket_size, largest))
    away = device == "cuda" and config.parallel.offload == "optimizer"  # masters, moments, and their update
    in_pieces = (
        config.parallel.master == "split" and not config.optimizer.compact_moments
    )  # which a kernel updates
    scratch = _SCRATCH[device] if in_pieces and not (away and stage < 3) else 0
    w, offloaded = _weight_bytes(config), offloaded_bytes(config, data * config.parallel.tensor)
    masters = 4 if stage == 3 else _master_bytes(config)
    state = offloaded or (masters + moment_bytes(config) + average_bytes(config)) * _owned(config, n, data)
    optimizer, host = (0.0, state) if away else (state, 0.0)
    if stage == 3:
        if device == "cuda":  # on a CPU pages that nothing touches take no memory
            bucket = max(bucket, config.parallel.bucket_size)
        # runtime/zero/stage3.py: the gradient's partition and a bucket that stay, two with overlap;
        # reduce_scatter_coalesced's copy, and then gloo's own copy of it, or the float32 partitions
        # one rank sends nothing, several in float32 unless told otherwise
        sent = 4 if data > 1 and config.parallel.reduce_dtype == "float32" else w
        copies = sent * bucket + max(sent * bucket if device == "cpu" else 0, 4 * n / data if bfloat16 else 0)
        filled = 2 if config.parallel.overlap and (device == "cuda" or n > bucket) else 1
        return _States(
            parameters=w * n / data,
            optimizer=optimizer,
            host=host,
            gradients=4 * n / data + w * bucket * filled,
            gathered=w * min(n, max(LIVE, largest)),
            early=0,
            reduce=copies,
            update=4 * n / data + scratch,
        )
    one = w * largest  # a parameter's gradient, before it is added to the sums
    shard = 4 * n / data if data > 1 or stage == 2 else 0
    # a byte count of each gradient that is on its way, all buckets' at once, with overlap and without: gloo adds in
    # copies of its own; in bfloat16 what is sent and received, and in finishing a bucket its sums, on a CPU from a copy
    on_way, added = (4 if device == "cpu" else 0), 0.0
    if config.parallel.reduce_dtype == "bfloat16":
        on_way, added = 2 + 2, 4 * bucket / data + (4 * bucket if device == "cpu" else 0)
    copies = on_way * n + added if data > 1 else 0
    if stage == 0:
        # every bucket's reduced shard is on its way at once
        return _States(w * n, optimizer, host, 4 * n, 0, 0, shard + one + copies, scratch)
    if stage == 1:
        return _States(w * n, optimizer, host, 4 * n + shard, 0, 0, one + copies, scratch)
    # own sums: of the bucket that fills and of one that is reduced, which may be that of the micro-batch before
    several, pending = 4 * bucket, 0.0
    if config.parallel.overlap:
        several = 4 * min(n * count_micro_batches(config, data), 2 * bucket)
        pending = several - 4 * min(n, bucket)
    early = pending if count_micro_batches(config, data) > 1 else 0
    reduced = on_way * bucket + added if data > 1 else 0
    if data > 1 and not added and (device == "cuda" or pending):
        reduced += 4 * bucket / data  # gloo fills it when it has freed the sums: then of an earlier bucket
    return _States(w * n, optimizer, host, shard, 0, early, several + reduced + one, scratch)


def _weight_bytes(config: Config) -> int:
    return 2 if config.training.precision == "bfloat16" else 4


def _master_bytes(config: Config) -> float:
    """Masters, where they are not the weights themselves, bytes a parameter (stages 0 to 2)."""
    return 0 if config.training.precision == "float32" else held_bytes(config.parallel.master)


def _owned(config: Config, n: float, data: int) -> float:
    """Of a tensor-parallel rank's parameters those that one of `data` ranks updates."""
    return n if config.parallel.zero_stage == 0 else n / data


def moment_bytes(config: Config) -> float:
    """Both moments, bytes a parameter, as `parallel.moments` holds them."""
    model, counts = config.model, count_parameters(config.model)
    widths = [layer.out_features for layer in block_layers(model) if layer.table_entries]
    # of the units that a row is cut into the smallest, which is all but a fifth of the tables'
    unit = min(size // num_chunks(size) for size in (model.hidden_size, *widths))
    share = (counts.tables + counts.embedding) / counts.total
    kinds = (config.optimizer.table_exp_avg, config.optimizer.table_exp_avg_sq)
    return sum(share * held_bytes(kind, unit) + (1 - share) * 4 for kind in kinds)


def average_bytes(config: Config) -> int:
    """The average of the weights, bytes a parameter."""
    return 4 if config.training.average_decay else 0


def _largest_parameter(model: ModelConfig) -> int:
    vocabulary = model.vocab_size * model.hidden_size
    return max(vocabulary, *(layer.largest for layer in block_layers(model)))


def _code(bits: int) -> int:
    """Bytes of a code: uint8, int16 or int32 (`kernels.hash_codes`)."""
    return 1 if bits <= 8 else 2 if bits <= 15 else 4
