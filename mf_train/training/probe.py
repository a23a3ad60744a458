"""What the trainer computes on fixed tokens, kept in each checkpoint so that a conversion can be proved against it."""

import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model.memory import record_codes
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange

PROBE_TOKENS = 64


def probe_tokens(config: ModelConfig) -> Tensor:
    """The fixed tokens, int64 [1, n]: uniformly random over the vocabulary, from generator seed 0."""
    length = min(PROBE_TOKENS, config.sequence_length)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def run_probe(engine: Engine, exchange: Exchange | None) -> dict[str, Tensor]:
    """`tokens` [n], `logits` float32 [n, V] and `codes.NAME` [n, K] of every hash. Collective over all ranks."""
    tokens = probe_tokens(engine.model.config)
    with torch.no_grad(), record_codes(engine.model) as codes:
        logits = engine.forward(tokens.to(engine.device))
    if exchange is not None:
        logits = exchange.all_gather(logits).movedim(0, -2).flatten(-2)
    return {"tokens": tokens[0], "logits": logits[0].float().cpu()} | {
        f"codes.{name}": value[0].cpu() for name, value in codes.items()
    }
