"""The validation loss of the model in training, over the blocks that `memoryformer evaluate` reads too."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mf_train.data.stream.validation import IGNORED, ValidationBlocks
from mf_train.parallel.engine import Engine


def validation_loss(
    engine: Engine, blocks: ValidationBlocks, batch_size: int, still_alive: Callable[[], None] = lambda: None
) -> float:
    """Mean loss of a token in nats. Rank r of R takes blocks r, r + R, ...; collective over all ranks.

    `still_alive` is called after each batch.
    """
    degrees = engine.groups.degrees
    length = blocks.sequence_length
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    rounds = -(-len(blocks) // degrees.data)
    mine = [number * degrees.data + degrees.data_rank for number in range(rounds)]
    for start in range(0, rounds, batch_size):
        batch = mine[start : start + batch_size]
        # every rank runs the same number of passes: one that has no block left runs one without targets
        inputs = torch.zeros((len(batch), length), dtype=torch.long)
        targets = torch.full((len(batch), length), IGNORED)
        for row, number in enumerate(batch):
            if number < len(blocks):
                inputs[row], targets[row] = (torch.from_numpy(array) for array in blocks[number])
        with torch.no_grad():
            losses = engine.losses(inputs.to(engine.device), targets.to(engine.device))
        sums[0] += losses.sum(dtype=torch.float64)
        still_alive()
        sums[1] += (targets != IGNORED).sum()
    dist.all_reduce(sums, group=engine.groups.data)
    return (sums[0] / sums[1]).item()


def validation_metrics(
    losses: Mapping[str, float], sets: Mapping[str, ValidationBlocks], weights: Sequence[float]
) -> dict[str, Any]:
    """Keys of metrics.jsonl: of each set its loss, perplexity, and bits a byte (None where its bytes are not known);
    `validation_loss`, the mean of the sets' losses by their weights.
    """
    total, found, mean = sum(weights), {}, 0.0
    for (name, loss), weight in zip(losses.items(), weights, strict=True):
        blocks = sets[name]
        mean += weight / total * loss  # of one set: its loss, to the last bit
        found[name] = {
            "loss": loss,
            "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item(),
            "bits_per_byte": loss * blocks.num_tokens / blocks.num_bytes / math.log(2)
            if blocks.num_bytes
            else None,
        }
    return {"validation_loss": mean, "validation": found}
