"""Bytes that one rank needs in training, from the configuration alone.

A step has three moments that can be its peak; the plan's is the largest of them:

    loss      all activations are kept, logits and their gradient exist, few gradients do
    reduce    the backward pass is over: all gradients exist, and the buffers that they are averaged in
    update    AdamW runs: gradients in float32 beside the masters and moments

What exists at each is that of DeepSpeed 0.19.8 as `parallel.engine` sets it up, read in its sources (named at each
function) and checked by `benchmarks.plan_memory`. n is the number of a tensor-parallel rank's parameters, R the
data-parallel degree.

The first step's moments come into being in its update, after its gradients are reduced: the second step reduces its
gradients beside them and needs more. Under stages 0 and 3 in float32 that is one more copy of the rank's parameters:
stage 0 reduces beside W + gradients + flat copy = 12 bytes and updates with W + gradients + moments = 16, and from the
second step on reduces beside 12 + 8 = 20.
"""

from dataclasses import dataclass

from mf_train.config import Config, ModelConfig
from mf_train.model.counts import CHECKPOINT_BYTES, count_parameters

BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, which `parallel.engine` leaves as it is
LIVE = 1_000_000_000  # elements that stage 3 keeps gathered: stage3_max_live_parameters
# Beside tensors. On a CPU: Python with torch and DeepSpeed (LIBRARIES, as resident before a model is built), and
# scratch; on a GPU: context, cuBLAS, NCCL.
LIBRARIES = 0.53e9
PROCESS = {"cpu": LIBRARIES + 15e6, "cuda": 1.0e9}


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: what stays between steps, what a step adds, and its peak."""

    parameters: float  # as the forward pass reads them
    optimizer: float  # float32 masters, where they are apart, and both moments
    gradients: float  # those that all micro-batches are summed in
    activations: float  # kept for the backward pass of one micro-batch, codes and weights included
    codes: float  # of these: codes and weights of the hashes
    logits: float  # logits, their gradient and what the loss takes beside them
    buffers: float  # communication: buckets and flat copies, at the moment `reduce`
    process: float
    peaks: dict[str, float]  # at each moment
    host: float  # a copy of the state that is saved beside the steps

    @property
    def peak(self) -> float:
        return max(self.peaks.values())


@dataclass(frozen=True)
class _States:
    """Bytes a stage holds: between steps, and in addition at the step's moments."""

    parameters: float
    optimizer: float
    gradients: float
    gathered: float  # stage 3: whole parameters while the loss is computed
    early: float  # buffers that exist from the backward pass's begin
    reduce: float  # gradients and buffers at the end of the backward pass
    update: float


def estimate_memory(config: Config, processes: int, device: str = "cuda") -> RankMemory:
    """Memory of a rank of `processes`; `device` "cpu" or "cuda". The degrees must divide (`check_degrees`)."""
    model, tensor = config.model, config.parallel.tensor
    data = processes // tensor
    n = count_parameters(model).total / tensor  # every parameter is split
    states = _states(config, n, data, device)
    tokens = config.training.micro_batch_size * model.sequence_length
    width = 2 if config.training.precision == "bfloat16" else 4
    codes = tokens * model.num_layers * code_bytes(model, width)
    layers = tokens * model.num_layers * block_bytes(model, tensor, width)
    # the final norm's two, gathered features, and int64 tokens and targets
    ends = tokens * (2 * model.hidden_size // tensor * width + (tensor > 1) * model.hidden_size * width + 24)
    if config.data.document_attention:
        ends += config.training.micro_batch_size * model.sequence_length**2 * width
    kept = layers + ends
    logits = tokens * model.vocab_size / tensor * loss_bytes(width, device)
    work = tokens * working_bytes(model, tensor, width)
    process = PROCESS[device]
    fixed = states.parameters + states.optimizer + states.gradients + process
    peaks = {
        "loss": fixed + states.gathered + states.early + kept + max(logits, work),
        "reduce": fixed + states.reduce + tokens * model.hidden_size // tensor * width,
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
        host=CHECKPOINT_BYTES * n / data if saves_beside else 0,
    )


def peak_bytes(config: Config, processes: int, device: str | None = None) -> float:
    """Peak memory of a rank. `device` None: as `training.device`, where auto counts as a CPU, which takes less."""
    kind = device or ("cuda" if config.training.device == "cuda" else "cpu")
    return estimate_memory(config, processes, kind).peak


def code_bytes(model: ModelConfig, width: int) -> int:
    """Codes and weights that one block keeps, bytes a token: those of all K tables on every rank."""
    if model.kind == "dense":
        return 0
    return model.num_tables * (2 * _code(model.bits) + _code(model.inner_bits) + 3 * width)


def block_bytes(model: ModelConfig, tensor: int, width: int) -> float:
    """What one block keeps for its backward pass, bytes a token of a rank.

    MemoryFormer: the inputs of both norms, what the hashes read, q, k and v after the rotation, attention's result, the
    inner norm's input and output, codes with weights, two float32 statistics of each norm, a softmax normaliser a head.
    """
    size, heads = model.hidden_size / tensor, model.num_heads / tensor
    if model.kind == "dense":
        return (8 * size + 8 * size) * width + 2 * 8 + 4 * heads
    inner = model.inner_size / tensor
    activation = inner * width if model.ffn_activation == "gelu" else 0
    return (8 * size + 2 * inner) * width + activation + code_bytes(model, width) + 3 * 8 + 4 * heads


def working_bytes(model: ModelConfig, tensor: int, width: int) -> float:
    """Gradients that a block's backward pass holds at once, bytes a token of a rank."""
    inner = 4 * model.hidden_size if model.kind == "dense" else model.inner_size
    return (4 * model.hidden_size + 2 * inner) / tensor * width


def loss_bytes(width: int, device: str) -> int:
    """Logits, their gradient and float32 copies at the loss's peak, bytes a logit.

    On a CPU the loss is one C++ pass and the gradient has the logits' dtype; in torch operations (`model.loss_steps`)
    float32 copies come beside them.
    """
    if device == "cpu":
        return 2 * width
    return 14 if width == 2 else 12


def _states(config: Config, n: float, data: int, device: str) -> _States:
    stage, bfloat16 = config.parallel.zero_stage, config.training.precision == "bfloat16"
    training = config.training
    accumulates = training.global_batch_size // (data * training.micro_batch_size) > 1
    bucket = (
        float(BUCKET) if device == "cuda" else min(n, BUCKET)
    )  # pages that nothing touches take no memory
    flat = min(n, BUCKET)
    largest = _largest_parameter(config.model) / config.parallel.tensor
    w = 2 if bfloat16 else 4
    if stage == 0:
        summed = w * n if accumulates else 0  # in `.grad`, while the next micro-batch's loss is computed
        if bfloat16:  # runtime/fp16/unfused_optimizer.py: gradients become float32 all at once
            return _States(2 * n, 12 * n, 0, 0, summed, 2 * n + 2 * flat, 2 * n + 4 * n)
        # torch's AdamW; runtime/engine.py allreduce_bucket copies the gradients into one, also for R = 1
        return _States(4 * n, 8 * n, 0, 0, summed, 4 * n + 4 * flat, 4 * n)
    if stage == 1 and bfloat16:
        # runtime/bf16_optimizer.py: float32 sums of all gradients; each group's is flattened into one, however large,
        # and that turned to bfloat16 for the all-reduce
        return _States(2 * n, 12 * n / data, 4 * n, 0, 0, 2 * n + 4 * n + 2 * n, 2 * n)
    if stage in (1, 2):
        # runtime/zero/stage_1_and_2.py: a bucket, its flat copy for the all-reduce, the partition's own gradients
        own = 4 * n / data
        earlier = own if bfloat16 or accumulates or n > BUCKET else 0
        cast = 4 * largest if bfloat16 else 0
        reduce = w * bucket + max(w * flat + earlier + cast, own)
        early = (w * bucket if device == "cuda" else 0) + (own if accumulates else 0)
        return _States(w * n, 12 * n / data, 0, 0, early, reduce, own)
    # runtime/zero/stage3.py: a bucket and the gradient's partition that stay; reduce_scatter_coalesced's copy, and then
    # gloo's own copy of it, or the float32 partitions
    copies = w * flat + max(w * flat if device == "cpu" else 0, 4 * n / data if bfloat16 else 0)
    return _States(
        parameters=w * n / data,
        optimizer=12 * n / data,
        gradients=4 * n / data + w * bucket,
        gathered=w * min(n, LIVE),
        early=0,
        reduce=copies,
        update=4 * n / data,
    )


def _largest_parameter(model: ModelConfig) -> int:
    vocabulary = model.vocab_size * model.hidden_size
    if model.kind == "dense":
        return max(vocabulary, 4 * model.hidden_size**2)
    up = 2**model.bits * model.inner_size
    down = 2**model.inner_bits * model.hidden_size
    return max(vocabulary, model.num_tables * max(up, down))


def _code(bits: int) -> int:
    """Bytes of a code: uint8, int16 or int32 (`kernels.hash_codes`)."""
    return 1 if bits <= 8 else 2 if bits <= 15 else 4
