"""probe.safetensors: what the trainer computes on a few tokens, so that a conversion can be proved against it.

`tokens` int64 [n]; `logits` float32 [n, V]; `codes.NAME` [n, K] of every hash, by the hash's name; `validation` uint8
[1]: 1 where the tokens are the beginning of the run's validation text, 0 where they are `random_tokens`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from mf_train.checkpoint.layout import PROBE
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile
from mf_train.config import ModelConfig

PROBE_TOKENS, MIN_PROBE_TOKENS = 128, 16
LOGIT_BYTES = 32 << 20  # of a probe's float32 logits; a conversion holds several times that
CODES = "codes."


def probe_length(config: ModelConfig) -> int:
    """Tokens of a probe: PROBE_TOKENS, or as many as have LOGIT_BYTES of logits (but MIN_PROBE_TOKENS), or what a
    sequence holds.
    """
    fitting = max(LOGIT_BYTES // (4 * config.vocab_size), MIN_PROBE_TOKENS)
    return min(PROBE_TOKENS, fitting, config.sequence_length)


def random_tokens(config: ModelConfig) -> Tensor:
    """The tokens of a run without validation text, int64 [n]: uniform over the vocabulary, from generator seed 0."""
    return torch.randint(
        config.vocab_size, (probe_length(config),), generator=torch.Generator().manual_seed(0)
    )


def probe_tensors(
    tokens: Tensor, logits: Tensor, codes: Mapping[str, Tensor], *, validation: bool
) -> dict[str, Tensor]:
    """The file's contents: tokens [n], logits [n, V] of any float dtype and device, codes [n, K] of each hash."""
    return {
        "logits": logits.float().cpu(),
        "validation": torch.tensor([validation], dtype=torch.uint8),
    } | code_tensors(tokens, codes)


def code_tensors(tokens: Tensor, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of the file's contents that `read_codes` gives back."""
    return {"tokens": tokens.cpu()} | {f"{CODES}{name}": value.cpu() for name, value in codes.items()}


def read_codes(reader: CheckpointReader) -> dict[str, Tensor]:
    """Tokens and codes of a checkpoint's probe, by their names in the file; {} where it has none. Raises UserError."""
    if PROBE not in reader.manifest.files:
        return {}
    with TensorFile(reader.checkpoint / PROBE, "use another checkpoint") as file:
        names = [name for name in file.tensors if name == "tokens" or name.startswith(CODES)]
        return {name: file.read(name) for name in names}
