"""Seconds of a training step from bytes and FLOPs: each part costs its largest bound, and parts follow one another.

Modelled: the kernels' bytes and FLOPs at a device's rates, a launch for every operation, ring collectives with a
latency a step. Nothing overlaps, as in `parallel.engine` (overlap_comm off). Not modelled: reading data, saving,
stragglers, a network that is shared or congested, rates that differ with sizes.
"""

from dataclasses import dataclass

from mf_train.config import Config, ModelConfig
from mf_train.model.counts import count_parameters
from mf_train.planning.devices import Device, Link
from mf_train.planning.memory import code_bytes, loss_bytes

_LAUNCHES = {
    "memoryformer": 60,
    "dense": 45,
}  # operations of a block, both passes (counted in the block's code)


@dataclass(frozen=True)
class Part:
    """A part of a step: what bounds it, and its seconds."""

    name: str
    bound: str  # copy, gather, flops, launch, inside, between
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """A step's parts, and what it makes."""

    parts: tuple[Part, ...]
    tokens: int  # a step, of all ranks

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Work:
    """Of one rank and one micro-batch."""

    name: str
    copy: float = 0  # bytes in long passes
    gather: float = 0  # bytes of table rows
    flops: float = 0
    launches: float = 0


def estimate_step(config: Config, nodes: int, per_node: int, device: Device) -> StepTime:
    """Time of a step on `nodes` x `per_node` ranks; the degrees must divide (`check_degrees`)."""
    ranks, tensor = nodes * per_node, config.parallel.tensor
    data = ranks // tensor
    micro_batches = config.training.global_batch_size // (data * config.training.micro_batch_size)
    precision = config.training.precision
    parts = [_bound(work, device, precision, micro_batches) for work in _compute(config, device.kind)]
    parts.append(_bound(_optimizer(config, data), device, precision, 1))
    often = micro_batches if config.parallel.zero_stage > 1 else 1
    parts.append(_bound(_gradient_copies(config, data), device, precision, often))
    if tensor > 1:
        parts.append(_tensor_parallel(config, device, micro_batches))
    parts += _data_parallel(config, nodes, per_node, device, micro_batches)
    tokens = config.training.global_batch_size * config.model.sequence_length
    return StepTime(tuple(parts), tokens)


def _bound(work: _Work, device: Device, precision: str, times: int) -> Part:
    seconds = {
        "copy": work.copy / device.copy,
        "gather": work.gather / device.gather,
        "flops": work.flops / device.flops[precision],
        "launch": work.launches * device.launch,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Part(work.name, bound, times * seconds[bound])


def _compute(config: Config, kind: str) -> list[_Work]:
    model, tensor = config.model, config.parallel.tensor
    b = 2 if config.training.precision == "bfloat16" else 4
    n, layers = config.training.micro_batch_size * model.sequence_length, model.num_layers
    size, inner = model.hidden_size / tensor, model.inner_size / tensor
    # q k^T and scores v, half of them above the diagonal; backward 5 products to the forward's 2
    attention = 2 * 2 * n * model.sequence_length * size / 2 * 3.5 * layers
    found = [_Work("attention", copy=layers * n * size * b * 12, flops=attention, launches=layers * 12)]
    if model.kind == "memoryformer":
        rows = model.num_tables * (3 * size + inner + size) * b  # of all five lookups, a token
        tables = count_parameters(model).tables / tensor * b
        hashed = n * (2 * size + inner) * b
        found += [
            _Work(
                "hash",
                copy=layers * (3 * hashed + 2 * n * code_bytes(model, b) / tensor),
                launches=layers * 6,
            ),
            _Work("lookup", copy=tables, gather=layers * n * rows, launches=layers * 6),
            # the rows again for the weights, dy once for each table; gradients written, read where they are summed
            _Work("lookup backward", copy=3 * tables, gather=2 * layers * n * rows, launches=layers * 12),
        ]
        features = 2 * size + inner
    else:
        found.append(
            _Work("dense layers", copy=3 * 12 * layers * size**2 * b, flops=6 * 12 * layers * n * size**2)
        )
        features = 2 * size + 4 * size
    found.append(
        _Work("norms and sums", copy=layers * n * (features * 8 + size * 8) * b, launches=layers * 20)
    )
    logits = n * model.vocab_size / tensor
    found.append(_Work("head", copy=3 * logits * b, flops=6 * logits * model.hidden_size, launches=6))
    found.append(_Work("loss", copy=2 * logits * loss_bytes(b, kind), launches=12))
    found.append(_Work("embedding", copy=4 * n * size * b + 2 * model.vocab_size * size * b, launches=4))
    return found


def _optimizer(config: Config, data: int) -> _Work:
    """AdamW reads masters, moments and gradients and writes all but the latter; norm, clipping, the new parameters."""
    n = count_parameters(config.model).total / config.parallel.tensor
    share = n / (data if config.parallel.zero_stage else 1)
    b = 2 if config.training.precision == "bfloat16" else 4
    return _Work("update", copy=share * (28 + 12 + 4 + b), launches=100)


def _gradient_copies(config: Config, data: int) -> _Work:
    """Passes over a micro-batch's gradients beside the collectives (the copies that `planning.memory` counts)."""
    n = count_parameters(config.model).total / config.parallel.tensor
    stage, bfloat16 = config.parallel.zero_stage, config.training.precision == "bfloat16"
    b = 2 if bfloat16 else 4
    if stage == 0:  # flattened, divided, copied back; in bfloat16 checked and turned to float32
        passes = 6 * b * n + (8 * n if bfloat16 else 0)
    elif (
        stage == 1 and bfloat16
    ):  # added to float32 sums, flattened, to bfloat16 and back, copied back, cleared
        passes = (10 + 8 + 6 + 6 + 8 + 4 + 2) * n
    else:  # into the bucket, divided, flattened or put in the ranks' order, then to the partition, twice
        passes = 6 * b * n + (2 * b + 8) * n / data
    return _Work("gradient copies", copy=passes, launches=100)


def _tensor_parallel(config: Config, device: Device, micro_batches: int) -> Part:
    """Codes and weights of three hashes a block, features before the head, sums of norms and of the loss."""
    model, tensor = config.model, config.parallel.tensor
    b = 2 if config.training.precision == "bfloat16" else 4
    n = config.training.micro_batch_size * model.sequence_length
    forward = code_bytes(model, b) * model.num_layers + model.hidden_size * b + 4 * 3 * tensor
    backward = 3 * model.num_tables * b * model.num_layers + model.hidden_size * b
    norms = (3 * model.num_layers + 1) * 2 * 2 * 4 * tensor
    calls = model.num_layers * (3 * 2 + 3 * 2) + 7
    ring = (tensor - 1) / tensor
    seconds = n * (forward + backward + norms) * ring / device.inside.bandwidth
    seconds += calls * (tensor - 1) * device.inside.latency
    return Part("tensor parallel", "inside", micro_batches * seconds)


def _data_parallel(
    config: Config, nodes: int, per_node: int, device: Device, micro_batches: int
) -> list[Part]:
    """Gradients averaged and parameters gathered over the data-parallel group, one ring."""
    tensor, stage = config.parallel.tensor, config.parallel.zero_stage
    data = nodes * per_node // tensor
    if data == 1:
        return []
    n = count_parameters(config.model).total / tensor
    b = 2 if config.training.precision == "bfloat16" else 4  # gradients travel in the parameters' dtype
    # neighbours in a node use its links; between nodes, as many network cards as the group has ranks there
    link, name = device.inside, "inside"
    if nodes > 1:
        shared = max(1, per_node // tensor)
        link = Link(min(device.inside.bandwidth, shared * device.between.bandwidth), device.between.latency)
        name = "between"
    bucket = max(1, n / 5e8)
    one_way = n * b * (data - 1) / data / link.bandwidth + bucket * _latency(nodes, data, device)
    if stage == 3:  # two gathers and a reduce-scatter of each micro-batch
        return [
            Part("gather parameters", name, 2 * micro_batches * one_way),
            Part("reduce gradients", name, micro_batches * one_way),
        ]
    often = micro_batches if stage == 2 else 1  # stage 2 averages each micro-batch's, by all-reduce
    parts = [Part("reduce gradients", name, 2 * often * one_way)]
    if stage:
        parts.append(Part("gather parameters", name, one_way))
    return parts


def _latency(nodes: int, data: int, device: Device) -> float:
    """Steps of a ring up to a node's ranks, of a tree over the nodes."""
    here = max(1, data // nodes)
    tree = (nodes - 1).bit_length()
    return (here - 1) * device.inside.latency + tree * device.between.latency


def model_flops(model: ModelConfig) -> float:
    """FLOPs that a token needs in training, 6 for each multiply-add of the forward pass as the paper counts them."""
    from mf_train.model.counts import count_block_flops

    block = count_block_flops(model).total / model.sequence_length
    return 6 * (model.num_layers * block + model.vocab_size * model.hidden_size)
