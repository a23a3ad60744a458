"""Bytes that a rank sends in a step, by group, from the configuration alone.

Bytes are those of a ring: of an all-gather or a reduce-scatter of M bytes a rank sends (R - 1) / R of M, of an
all-reduce twice that. Collectives of single numbers (the loss, the gradient's norm) are left out.
"""

from mf_train.config import Config
from mf_train.model.counts import count_parameters
from mf_train.planning.memory import LIVE
from mf_train.planning.work import element_bytes, step_tokens


def micro_batches(config: Config, data: int) -> int:
    """Micro-batches of a step on each of `data` ranks."""
    return config.training.global_batch_size // (data * config.training.micro_batch_size)


def data_parallel_bytes(config: Config, data: int) -> dict[str, float]:
    """By purpose, of one rank in one step. Gradients and parameters travel in the parameters' dtype.

    Stages 0 and 1 average gradients once a step, stages 2 and 3 for each micro-batch; 0 to 2 by all-reduce,
    stage 3 by reduce-scatter. Stages 1 and 2 gather parameters after the update, stage 3 for each
    micro-batch, and again for the backward pass where a rank's share of the model is too large to stay gathered
    (stage3_max_live_parameters; then this is an upper bound). tests/planning/test_traffic.py counts the collectives of
    deepspeed 0.19.8.
    """
    if data == 1:
        return {}
    stage, times = config.parallel.zero_stage, micro_batches(config, data)
    parameters = count_parameters(config.model).total / config.parallel.tensor * element_bytes(config)
    one_way = parameters * (data - 1) / data
    if stage == 3:
        gathers = 1 if count_parameters(config.model).total / config.parallel.tensor <= LIVE else 2
        return {"reduce gradients": times * one_way, "gather parameters": gathers * times * one_way}
    sent = {"reduce gradients": 2 * one_way * (times if stage == 2 else 1)}
    return sent | ({"gather parameters": one_way} if stage else {})


def data_parallel_bytes_per_token(config: Config, data: int) -> float:
    """For each token that a data-parallel rank trains on."""
    return sum(data_parallel_bytes(config, data).values()) / (step_tokens(config) / data)


def tensor_parallel_bytes_per_token(config: Config) -> float:
    """Codes and weights of three hashes a block and the weights' gradients, sums of norms, features before the head and
    their gradient, three sums of the loss (SPEC 4). `parallel.exchange` counts the same while it sends.
    """
    model, tensor = config.model, config.parallel.tensor
    if tensor == 1:
        return 0
    b = element_bytes(config)
    # a code travels in one byte, or in two (`parallel.exchange`)
    wires = sum(1 if bits <= 8 else 2 for bits in (model.bits, model.bits, model.inner_bits))
    hashes = model.num_layers * model.num_tables * (wires + 3 * b + 3 * b)
    shared = hashes + 2 * model.hidden_size * b
    sums = (3 * model.num_layers + 1) * (2 + 2) * 4 + 3 * 4  # whole on each rank
    return (tensor - 1) / tensor * shared + (tensor - 1) * sums
