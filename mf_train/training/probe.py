"""The trainer's logits and codes on fixed tokens, kept in each checkpoint so that a conversion is proved against it."""

import torch
from torch import Tensor

from mf_train.checkpoint.probe import code_tensors, probe_length, probe_tensors, random_tokens
from mf_train.data.stream.validation import ValidationBlocks
from mf_train.model.memory import record_codes
from mf_train.parallel.engine import Engine
from mf_train.parallel.exchange import Exchange, gather_features


def run_probe(
    engine: Engine, exchange: Exchange | None, validation: ValidationBlocks | None
) -> dict[str, Tensor]:
    """Logits and codes on the first validation tokens, or on random ones, as checkpoint/probe.py lays them out.

    Collective over all ranks, which all get the same.
    """
    tokens, logits, codes = _pass(engine, validation)
    if exchange is not None:
        logits = gather_features(logits, exchange)
    return probe_tensors(tokens, logits[0], codes, validation=validation is not None)


def probe_codes(engine: Engine, validation: ValidationBlocks | None) -> dict[str, Tensor]:
    """The tokens and codes of `run_probe` without the logits. Collective over all ranks, which all get the same."""
    tokens, _, codes = _pass(engine, validation)
    return code_tensors(tokens, codes)


@torch.no_grad()
def _pass(engine: Engine, validation: ValidationBlocks | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens [n], this rank's logits [1, n, V/P], and codes [n, K] of each hash."""
    config = engine.model.config
    if validation is None:
        tokens = random_tokens(config)
    else:
        tokens = torch.from_numpy(validation.tokens_t[: probe_length(config)]).long()
    with record_codes(engine.model) as codes:
        logits = engine.forward(tokens.unsqueeze(0).to(engine.device))
    return tokens, logits, {name: value[0] for name, value in codes.items()}
