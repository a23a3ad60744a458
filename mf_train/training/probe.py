"""What the trainer computes on fixed tokens, kept in each checkpoint so that a conversion can be proved against it."""

import torch
from torch import Tensor

from mf_train.checkpoint.probe import probe_length, probe_tensors, random_tokens
from mf_train.data.validation import ValidationBlocks
from mf_train.model.memory import record_codes
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange


def run_probe(
    engine: Engine, exchange: Exchange | None, validation: ValidationBlocks | None
) -> dict[str, Tensor]:
    """Logits and codes on the begin of the validation text, or on random tokens, as checkpoint/probe.py lays them out.

    Collective over all ranks, which all get the same.
    """
    config = engine.model.config
    if validation is None:
        tokens = random_tokens(config)
    else:
        tokens = torch.from_numpy(validation.tokens_t[: probe_length(config)]).long()
    with torch.no_grad(), record_codes(engine.model) as codes:
        logits = engine.forward(tokens.unsqueeze(0).to(engine.device))
    if exchange is not None:
        logits = exchange.all_gather(logits).movedim(0, -2).flatten(-2)
    return probe_tensors(
        tokens,
        logits[0],
        {name: value[0] for name, value in codes.items()},
        validation=validation is not None,
    )
