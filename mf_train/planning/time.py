"""Seconds of a training step from bytes and FLOPs: each part costs its largest bound, and parts follow one another.

Modelled: the kernels' bytes and FLOPs at a device's rates, a launch for every operation, ring collectives with a
latency a step. Parts follow one another: what `parallel.overlap` hides is not taken off. Not modelled: reading data,
saving, stragglers, a network that is shared or congested, rates that differ with sizes.
"""

from dataclasses import dataclass, replace

from mf_train.config import Config
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import count_micro_batches, micro_batch_sizes
from mf_train.planning.devices import Device, Link
from mf_train.planning.work import (
    PartWork,
    data_parallel_bytes,
    gradient_copies,
    held_work,
    micro_batch_work,
    recomputed_work,
    step_tokens,
    tensor_parallel_bytes_per_token,
    update_work,
)


@dataclass(frozen=True)
class PartTime:
    """A part of a step: what bounds it, and its seconds."""

    name: str
    bound: str  # copy, gather, flops, launch, host, inside, between
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """A step's parts, and what it makes."""

    parts: tuple[PartTime, ...]
    tokens: int  # a step, of all ranks

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def estimate_step(config: Config, nodes: int, per_node: int, device: Device) -> StepTime:
    """Time of a step on `nodes` x `per_node` ranks; the degrees must have passed `check_degrees`."""
    tensor, stage = config.parallel.tensor, config.parallel.zero_stage
    data = nodes * per_node // tensor
    largest = micro_batch_sizes(config, data)[0]
    config = replace(config, training=replace(config.training, micro_batch_size=largest))
    times, precision = count_micro_batches(config, data), config.training.precision
    works = micro_batch_work(config, tensor) + recomputed_work(config, tensor)
    parts = [_bound(work, device, precision, times) for work in works]
    share = count_parameters(config.model).total / tensor / (data if stage else 1)
    updates = [update_work(config, share), held_work(config, share)]
    if config.parallel.offload == "optimizer" and device.kind == "cuda":
        # all of it is done there, and gradients go there; on a CPU they are there
        updates = [replace(work, copy=0, host=work.copy) for work in updates]
        updates.append(PartWork("gradients to host", host=4 * share))
    parts += [_bound(work, device, precision, 1) for work in updates if work.copy or work.host]
    copies = gradient_copies(config, data, cuda=device.kind == "cuda")
    parts.append(_bound(copies, device, precision, times))
    if tensor > 1:
        parts.append(_tensor_parallel(config, device, times))
    parts += _data_parallel(config, nodes, per_node, device)
    return StepTime(tuple(parts), step_tokens(config))


def _bound(work: PartWork, device: Device, precision: str, times: int) -> PartTime:
    """The largest of the part's bounds, `times` over. A CPU runs an operation when it is launched: there it adds."""
    seconds = {
        "copy": work.copy / device.copy,
        "gather": work.gather / device.gather,
        "flops": work.flops / device.flops[precision],
        "launch": work.launches * device.launch,
        "host": work.host / device.host,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    added = seconds["launch"] if device.kind == "cpu" and bound != "launch" else 0
    return PartTime(work.name, bound, times * (seconds[bound] + added))


def _tensor_parallel(config: Config, device: Device, times: int) -> PartTime:
    """Codes and weights of three hashes a block, features before the head, sums of norms and of the loss."""
    tensor = config.parallel.tensor
    tokens = config.training.micro_batch_size * config.model.sequence_length
    calls = config.model.num_layers * (3 * 2 + 3 * 2) + 7
    seconds = tokens * tensor_parallel_bytes_per_token(config) / device.inside.bandwidth
    seconds += calls * (tensor - 1) * device.inside.latency
    return PartTime("tensor parallel", "inside", times * seconds)


def _data_parallel(config: Config, nodes: int, per_node: int, device: Device) -> list[PartTime]:
    """Gradients averaged and parameters gathered over the data-parallel group, one ring."""
    tensor = config.parallel.tensor
    data = nodes * per_node // tensor
    # neighbours in a node use its links; between nodes, as many network cards as the group has ranks there
    link, name = device.inside, "inside"
    if nodes > 1:
        shared = max(1, per_node // tensor)
        link = Link(min(device.inside.bandwidth, shared * device.between.bandwidth), device.between.latency)
        name = "between"
    buckets = max(1, count_parameters(config.model).total / tensor / config.parallel.bucket_size)
    stage, times = config.parallel.zero_stage, count_micro_batches(config, data)
    parts = []
    for purpose, sent in data_parallel_bytes(config, data).items():
        calls = buckets * (times if stage == 3 or (stage == 2 and purpose == "reduce gradients") else 1)
        parts.append(PartTime(purpose, name, sent / link.bandwidth + calls * _latency(nodes, data, device)))
    return parts


def _latency(nodes: int, data: int, device: Device) -> float:
    """Steps of a ring up to a node's ranks, of a tree over the nodes."""
    here = max(1, data // nodes)
    tree = (nodes - 1).bit_length()
    return (here - 1) * device.inside.latency + tree * device.between.latency
