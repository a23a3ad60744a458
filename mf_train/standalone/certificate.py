"""The proof of a conversion: what the written model computes on fixed tokens against what the trainer recorded."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mf_train.errors import TrainingError, UserError
from mf_train.model.memory import record_codes
from mf_train.standalone.load import load_model

CERTIFICATE = "certificate.json"
FORMAT = 1
LOGIT_LIMIT = 1e-5  # of float32 weights of a float32 run; and no code may change
_CODES = "codes."


@dataclass(frozen=True)
class Comparison:
    """Trainer's recorded results and the written model's on the same tokens."""

    tokens: list[int]
    largest_logit_difference: float
    changed_codes: dict[str, float]  # share of the codes of each hash, by the hash's name
    changed: int
    codes: int  # compared, in all
    recorded_loss: float  # the trainer's mean cross-entropy of each token but the first, in nats
    loss: float  # the written model's
    divergence: float  # mean KL divergence of its predictions from the trainer's, in nats

    @property
    def loss_difference(self) -> float:
        return self.loss - self.recorded_loss


def read_probe(path: Path) -> dict[str, Tensor]:
    """What the trainer recorded: `tokens` [n], `logits` [n, V], `codes.NAME` [n, K]. Raises UserError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged ({error}); use another checkpoint") from None


def compare(folder: Path, probe: Mapping[str, Tensor]) -> Comparison:
    """Load the model that was written and run the plain model on the trainer's tokens.

    The model's files are mapped into memory for this and not copied.
    """
    model = load_model(folder)
    with torch.no_grad(), record_codes(model) as codes:
        logits = model(probe["tokens"].unsqueeze(0))[0].float()
    recorded = {name.removeprefix(_CODES): codes for name, codes in probe.items() if name.startswith(_CODES)}
    assert recorded.keys() == codes.keys(), "the checkpoint's probe and the model have different hashes"
    changed = {name: int((recorded[name] != codes[name][0]).sum()) for name in recorded}
    before, after = probe["logits"].double().log_softmax(-1), logits.double().log_softmax(-1)
    targets = probe["tokens"][1:]
    return Comparison(
        tokens=probe["tokens"].tolist(),
        largest_logit_difference=(logits - probe["logits"]).abs().max().item(),
        changed_codes={name: count / recorded[name].numel() for name, count in changed.items()},
        changed=sum(changed.values()),
        codes=sum(codes.numel() for codes in recorded.values()),
        recorded_loss=F.nll_loss(before[:-1], targets).item(),
        loss=F.nll_loss(after[:-1], targets).item(),
        divergence=F.kl_div(after, before, reduction="batchmean", log_target=True).item(),
    )


def check(comparison: Comparison, exact: bool) -> None:
    """Refuse a conversion that is not what was trained. `exact`: a float32 run on a CPU, written in float32.

    Raises TrainingError with the numbers.
    """
    difference = comparison.largest_logit_difference
    if not math.isfinite(difference):
        raise TrainingError(
            f"the converted model's logits differ from the trainer's by {difference}; not written"
        )
    if exact and (difference > LOGIT_LIMIT or comparison.changed):
        raise TrainingError(
            f"the converted model's logits differ from the trainer's by {difference:.3g} (allowed: {LOGIT_LIMIT:g}) "
            f"and {comparison.changed} of {comparison.codes} codes changed (allowed: none); not written. Convert on "
            "the kind of processor that trained, or use another checkpoint"
        )


def write_certificate(
    folder: Path, source: Mapping[str, Any], dtype: str, tensors: Mapping[str, str], comparison: Comparison
) -> None:
    """certificate.json: SHA-256 of every tensor and of every other file of the folder, and the comparison.

    `dtype` is `convert`'s. Losses and the divergence are in nats a token.
    """
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.suffix != ".safetensors"
    }
    certificate = {
        "format": FORMAT,
        "source": dict(source),
        "dtype": dtype,
        "torch": torch.__version__,
        "probe": {
            "tokens": comparison.tokens,
            "largest_logit_difference": comparison.largest_logit_difference,
            "changed_codes": comparison.changed_codes,
            "predicted_tokens": len(comparison.tokens) - 1,
            "recorded_loss": comparison.recorded_loss,
            "loss": comparison.loss,
            "loss_difference": comparison.loss_difference,
            "divergence": comparison.divergence,
        },
        "tensors": dict(tensors),
        "files": files,
    }
    (folder / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n", encoding="utf-8")
