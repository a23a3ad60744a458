"""The proof of a conversion; certificate.json keeps it.

Three models compute on the tokens of the checkpoint's probe, with the plain model's code and weights left in files:

- replay: the checkpoint's weights in the run's precision, against what the trainer recorded. That the checkpoint and
  its names are the trained model.
- copy: the checkpoint's weights rounded to the dtype written, against the written folder. That the files hold that
  model: equal to the bit, whatever the dtype and wherever it was trained.
- rounding: the first against the folder. What the dtype costs.

In the replay each hash hands on the trainer's codes. Hashing is discontinuous, and a code that another processor's
rounding changes would change everything behind it; so each layer is measured by itself, and a wrong one stands out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mf_train.checkpoint.layout import AVERAGE, PROBE, DamageError
from mf_train.checkpoint.probe import CODES
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile
from mf_train.config import Config
from mf_train.errors import TrainingError
from mf_train.standalone.conversion.streamed_model import (
    CheckpointWeights,
    FolderWeights,
    Results,
    compute,
    streamed_model,
)

# Of a float32 run on a CPU: the largest difference of a logit, as a share of the largest logit; and no code may change.
# Another kind of CPU, or another number of threads, adds in another order: measured, up to 1e-6 of the largest logit.
# Rounding to bfloat16, the least that is not the model that was trained, is of the order of 1e-3: this is between.
LOGIT_LIMIT = 3e-5
# Any other run's processor rounds otherwise. What roundings do to a model is measured on itself: its results in float32
# and in bfloat16 differ by those of all weights and all activations. A replay may differ by so many times that, and by
# this share of a hash's codes more, because few codes are a small sample.
NOISE_FACTOR, CODES_SLACK = 2.0, 0.01
_LARGEST_LOSS = 700.0  # the largest float is e^709
_WIDE_LOGITS = 1 << 20  # that are in float64 at a time


@dataclass(frozen=True)
class Difference:
    """Between two models' results on the same tokens."""

    largest_logit_difference: float
    relative_logit_error: float  # root mean square of the difference, as a share of the logits' spread
    changed_codes: dict[str, float]  # share of the codes of each hash, by the hash's name
    changed: int
    codes: int  # compared, in all

    @property
    def nothing(self) -> bool:
        return self.largest_logit_difference == 0 and self.changed == 0


@dataclass(frozen=True)
class Comparison(Difference):
    """As `Difference`, and the two models' predictions of each token but the first, in nats a token."""

    recorded_loss: float  # the first model's mean cross-entropy
    loss: float  # the second's
    loss_difference: float
    recorded_perplexity: float
    perplexity: float
    divergence: float  # mean KL divergence of the second's predictions from the first's


@dataclass(frozen=True)
class Probe:
    """What the trainer recorded in the checkpoint; `text` is "validation" or "random"."""

    results: Results
    text: str


@dataclass(frozen=True)
class Allowed:
    """How far a replay may be from the trainer: share of each hash's codes, and error of the logits."""

    codes: float
    logits: float  # the largest difference where it has to be exact, else as `relative_logit_error`


@dataclass(frozen=True)
class Proof:
    """What `prove` found. `probe` compares the trainer with the written model, `rounding` what is between."""

    text: str
    tokens: list[int]
    precision: str
    exact: bool
    allowed: Allowed
    replay: Difference
    logits: int  # of the copy that were compared, and found equal
    probe: Comparison
    rounding: Comparison


def read_probe(reader: CheckpointReader, config: Config) -> Probe:
    """Raises UserError where it is damaged or does not fit the configuration."""
    path = reader.checkpoint / PROBE
    reader.read_file(PROBE)  # its checksum
    with TensorFile(path, "use another checkpoint") as file:
        tensors = {name: file.read(name) for name in file.tensors}
    codes = {name.removeprefix(CODES): value for name, value in tensors.items() if name.startswith(CODES)}
    tokens, logits = tensors.get("tokens"), tensors.get("logits")
    vocabulary, validation = config.model.vocab_size, tensors.get("validation", torch.zeros(1))
    if (
        tokens is None
        or logits is None
        or (tokens.dtype, tokens.dim(), logits.dtype) != (torch.int64, 1, torch.float32)
        or not 0 < len(tokens) <= config.model.sequence_length
        or not 0 <= tokens.min() <= tokens.max() < vocabulary
        or logits.shape != (len(tokens), vocabulary)
        or any(len(value) != len(tokens) for value in codes.values())
    ):
        raise DamageError(path, "does not fit the checkpoint's config.yaml")
    return Probe(Results(tokens, logits, codes), "validation" if validation.any() else "random")


def prove(reader: CheckpointReader, config: Config, device: str, dtype: str, folder: Path) -> Proof:
    """Compare the trainer, the checkpoint and the written folder. `device` trained; `dtype` is `convert`'s.

    The trainer has not computed with an average of its weights: what the checkpoint's gives here stands for it.

    Raises TrainingError where they are not the same model, UserError where a file is damaged.
    """
    probe, precision = read_probe(reader, config), config.training.precision
    recorded = probe.results

    def plain(dtype: str, forced: Mapping[str, Tensor] | None = None) -> Results:
        return compute(
            streamed_model(config.model, CheckpointWeights(reader, dtype)), recorded.tokens, forced
        )

    if reader.weights == AVERAGE:
        recorded, device = plain(precision), "cpu"
    native = plain(precision, recorded.codes)
    if {name: value.shape for name, value in native.codes.items()} != {
        name: value.shape for name, value in recorded.codes.items()
    }:
        raise DamageError(reader.checkpoint / PROBE, "holds codes of another model")
    # on another kind of processor a value that rounds across zero may change a code, and no conversion is to blame
    replay, exact = subtract(recorded, native), precision == "float32" and device == "cpu"
    allowed = Allowed(0.0, LOGIT_LIMIT * _largest(recorded.logits) if exact else 0.0)
    if not (exact or replay.nothing):
        noise = subtract(native, plain("bfloat16" if precision == "float32" else "float32", recorded.codes))
        share = max(noise.changed_codes.values(), default=0.0)
        allowed = Allowed(NOISE_FACTOR * share + CODES_SLACK, NOISE_FACTOR * noise.relative_logit_error)
    check_replay(replay, allowed, exact)
    if replay.changed:
        native = plain(precision)
    weights = FolderWeights(folder)
    written = compute(streamed_model(weights.config, weights), recorded.tokens)
    check_copy(native if dtype == precision else plain(dtype), written, dtype)
    if not written.logits.isfinite().all():
        raise TrainingError("the written model's logits are not finite; use another checkpoint or --dtype")
    comparison = compare(recorded, written)
    return Proof(
        text=probe.text,
        tokens=recorded.tokens.tolist(),
        precision=precision,
        exact=exact,
        allowed=allowed,
        replay=replay,
        logits=written.logits.numel(),
        probe=comparison,
        rounding=comparison if replay.nothing else compare(native, written),
    )


def check_replay(difference: Difference, allowed: Allowed, exact: bool) -> None:
    """Refuse a checkpoint whose weights do not compute what the trainer did. Raises TrainingError with the numbers."""
    error = difference.largest_logit_difference if exact else difference.relative_logit_error
    wrong = [name for name, share in difference.changed_codes.items() if share > allowed.codes]
    if not wrong and error <= allowed.logits and math.isfinite(error):
        return
    first = f", first of {wrong[0]}" if wrong else ""
    measure = (
        "differ from the trainer's by"
        if exact
        else "differ from the trainer's, as a share of their spread, by"
    )
    codes = "none" if exact else f"{allowed.codes:.2%} of a hash's"
    raise TrainingError(
        f"the checkpoint's weights are not the model that was trained: on its tokens the logits {measure} {error:.3g} "
        f"(allowed: {allowed.logits:.3g}) and {difference.changed} of {difference.codes} codes changed{first} "
        f"(allowed: {codes}); convert on the kind of processor that trained, or use another checkpoint"
    )


def check_copy(expected: Results, written: Results, dtype: str) -> None:
    """Refuse a folder that does not compute what the checkpoint's weights do. Raises TrainingError."""
    logits = int((expected.logits.view(torch.int32) != written.logits.view(torch.int32)).sum())
    codes = {name: int((value != written.codes[name]).sum()) for name, value in expected.codes.items()}
    if logits or any(codes.values()):
        first = next((name for name, count in codes.items() if count), "the logits")
        raise TrainingError(
            f"the written model is not the checkpoint's in {dtype}: {logits} logits and {sum(codes.values())} codes "
            f"differ, first of {first}, and none may; convert again, and report it if it happens again"
        )


def subtract(before: Results, after: Results) -> Difference:
    """Of two models that have the same hashes."""
    largest = squares = spread = 0.0
    rows = _rows(before.logits)
    for old, new in zip(before.logits.split(rows), after.logits.split(rows), strict=True):
        spread += old.double().sub_(old.double().mean(-1, keepdim=True)).square_().sum().item()
        if not torch.equal(old, new):
            difference = (new - old).double()
            largest = max(largest, difference.abs().max().nan_to_num(math.inf, math.inf).item())
            squares += difference.square_().sum().item()
    changed = {name: int((value != after.codes[name]).sum()) for name, value in before.codes.items()}
    return Difference(
        largest_logit_difference=largest,
        relative_logit_error=math.sqrt(squares / spread) if spread else math.sqrt(squares),
        changed_codes={name: count / before.codes[name].numel() for name, count in changed.items()},
        changed=sum(changed.values()),
        codes=sum(value.numel() for value in before.codes.values()),
    )


def compare(before: Results, after: Results) -> Comparison:
    """Of two models that have the same hashes."""
    losses, divergence = [0.0, 0.0], 0.0
    size = _rows(before.logits)
    targets = before.tokens[1:].split(size)
    pairs = zip(before.logits.split(size), after.logits.split(size), strict=True)
    for index, rows in enumerate(pairs):
        same = torch.equal(*rows)
        old = rows[0].double().log_softmax(-1)
        new = old if same else rows[1].double().log_softmax(-1)
        divergence += 0.0 if same else (old.exp() * (old - new)).sum().item()
        if index < len(targets):
            place = targets[index].unsqueeze(-1)
            for which, values in enumerate((old, new)):
                losses[which] -= values[: len(place)].gather(-1, place).sum().item()
    tokens = len(before.tokens)
    recorded_loss, loss = (value / max(tokens - 1, 1) for value in losses)
    return Comparison(
        **vars(subtract(before, after)),
        recorded_loss=recorded_loss,
        loss=loss,
        loss_difference=loss - recorded_loss,
        recorded_perplexity=math.exp(min(recorded_loss, _LARGEST_LOSS)),
        perplexity=math.exp(min(loss, _LARGEST_LOSS)),
        divergence=divergence / tokens,
    )


def _rows(logits: Tensor) -> int:
    return max(_WIDE_LOGITS // logits.shape[-1], 1)


def _largest(logits: Tensor) -> float:
    """Magnitude, without a copy of them; NaN where one is."""
    return max(abs(each.item()) for each in torch.aminmax(logits))
