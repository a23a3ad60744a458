"""The proof's measures and bounds: what another processor's rounding may change, and what it may not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from mf_train.checkpoint.layout import CONFIG, MANIFEST, PROBE, STATE, read_manifest
from mf_train.checkpoint.probe import probe_tensors, random_tokens
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import ModelConfig
from mf_train.errors import TrainingError, UserError
from mf_train.model.attention.base import Attention
from mf_train.model.norm import Norm
from mf_train.standalone.conversion.check import check_conversion
from mf_train.standalone.conversion.convert import convert, open_checkpoint
from mf_train.standalone.conversion.proof import Results, compare, prove, read_probe, subtract
from mf_train.standalone.conversion.streamed_model import CheckpointWeights, compute, streamed_model
from tests.standalone.checkpoints import (
    certificate_of,
    random_weights,
    renew_manifest,
    write_checkpoint,
    write_tensors,
)

SMALL = ModelConfig(
    hidden_size=64, num_layers=3, num_heads=4, bits=4, vocab_size=4096, sequence_length=64, temperature=1.5
)


def results(seed: int, tokens: int = 37) -> Results:
    generator = torch.Generator().manual_seed(seed)
    return Results(
        tokens=torch.randint(50, (tokens,), generator=torch.Generator().manual_seed(0)),
        logits=torch.randn(tokens, 50, generator=generator),
        codes={
            "a": torch.randint(4, (tokens, 3), generator=generator, dtype=torch.uint8),
            "b": torch.randint(4, (tokens, 5), generator=generator, dtype=torch.int16),
        },
    )


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 37])
def test_measures_are_those_of_float64(tokens: int) -> None:
    before, after = results(1, tokens), results(2, tokens)
    found = compare(before, after)
    a, b = before.logits.double(), after.logits.double()
    assert found.largest_logit_difference == pytest.approx((a - b).abs().max().item(), rel=1e-6)
    spread = (a - a.mean(-1, keepdim=True)).square().mean().sqrt()
    expected = ((a - b).square().mean().sqrt() / spread).item()
    assert found.relative_logit_error == pytest.approx(expected, rel=1e-6)
    changed = {name: int((before.codes[name] != after.codes[name]).sum()) for name in ("a", "b")}
    assert found.changed == sum(changed.values()) > 0
    assert found.codes == 8 * tokens
    shares = {"a": changed["a"] / (3 * tokens), "b": changed["b"] / (5 * tokens)}
    assert found.changed_codes == shares
    a, b = a.log_softmax(-1), b.log_softmax(-1)
    divergence = F.kl_div(b, a, reduction="batchmean", log_target=True).item()
    assert found.divergence == pytest.approx(divergence, rel=1e-9)
    if tokens > 1:
        losses = [F.nll_loss(each[:-1], before.tokens[1:]).item() for each in (a, b)]
        assert [found.recorded_loss, found.loss] == pytest.approx(losses, rel=1e-9)
        assert found.loss_difference == pytest.approx(losses[1] - losses[0], rel=1e-9)


def test_equal_results_differ_by_nothing() -> None:
    found = compare(results(1), results(1))
    assert found.nothing and found.relative_logit_error == 0
    assert found.divergence == found.loss_difference == 0
    other = results(1)
    other.logits[3, 4] = math.nan
    assert subtract(results(1), other).largest_logit_difference == math.inf
    assert not subtract(results(1), other).nothing


def perturb(model: nn.Module, size: float) -> None:
    """As another processor would round: results of norms and attention move by a share of about `size`."""
    generator = torch.Generator().manual_seed(7)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator)
        return (output.float() * (1 + size * noise)).to(output.dtype)

    for module in model.modules():
        if isinstance(module, Norm | Attention):
            module.register_forward_hook(hook)


def trained_elsewhere(folder: Path, precision: str, size: float) -> Path:
    """A checkpoint whose probe was computed on a GPU, or so it says."""
    write_checkpoint(folder, SMALL, random_weights(SMALL, 1), tensor=2)
    model = streamed_model(SMALL, CheckpointWeights(CheckpointReader(folder), precision))
    perturb(model, size)
    found = compute(model, random_tokens(SMALL))
    write_tensors(folder / PROBE, probe_tensors(found.tokens, found.logits, found.codes, validation=False))
    tree = yaml.safe_load((folder / CONFIG).read_text())
    tree["training"]["precision"] = precision
    (folder / CONFIG).write_text(yaml.safe_dump(tree))
    (folder / STATE).write_text(
        json.dumps({"step": 7, "tokens": 700, "device": "cuda", "metrics": {"loss": 1.5}})
    )
    renew_manifest(folder)
    return folder


@pytest.mark.parametrize(("precision", "size"), [("bfloat16", 2**-9), ("float32", 2**-11)])
def test_another_processors_rounding_is_no_damage(precision: str, size: float, tmp_path: Path) -> None:
    checkpoint = trained_elsewhere(tmp_path / "step-000000007", precision, size)
    said = list(convert(checkpoint, tmp_path / "model"))
    tree = certificate_of(tmp_path / "model")
    replay, probe = tree["replay"], tree["probe"]
    assert not replay["exact"] and 0 < replay["relative_logit_error"] <= replay["allowed_logit_error"] < 0.1
    assert 0 < max(replay["changed_codes"].values()) <= replay["allowed_changed_codes"] < 0.1
    assert any("another processor rounds otherwise" in line for line in said)
    # without the trainer's codes handed on, one change brings others, layer after layer
    assert max(probe["changed_codes"].values()) > max(replay["changed_codes"].values())
    assert tree["rounding"]["largest_logit_difference"] == 0  # all of that is the processor's
    assert tree["copy"] == {"equal_logits": 64 * 4096, "equal_codes": 64 * 16 * 9}


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("pair", ["query key", "key value", "down query"])
def test_other_weights_are_no_rounding(
    pair: str, layer: int, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained_elsewhere(tmp_path / "step-000000007", precision, 2**-9)
    reader, config = open_checkpoint(checkpoint)
    one, other = (f"blocks.{layer}.{name}.bias" for name in pair.split())
    names = {one: other, other: one}
    if "down" not in pair:
        names |= {name.replace("bias", "tables"): to.replace("bias", "tables") for name, to in names.items()}
    sound = CheckpointReader.rows

    def rows(self: CheckpointReader, name: str, indices: Tensor) -> Tensor:
        return sound(self, names.get(name, name), indices)

    monkeypatch.setattr(CheckpointReader, "rows", rows)
    with pytest.raises(TrainingError, match="the checkpoint's weights are not the model that was trained"):
        prove(reader, config, "cuda", precision, tmp_path)


def test_a_float32_run_on_a_cpu_must_be_exact(tmp_path: Path) -> None:
    checkpoint = trained_elsewhere(tmp_path / "step-000000007", "float32", 2**-14)
    reader, config = open_checkpoint(checkpoint)
    with pytest.raises(
        TrainingError, match=r"\(allowed: [\d.e-]+\) and \d+ of \d+ codes .* \(allowed: none\)"
    ):
        prove(reader, config, "cpu", "float32", tmp_path)


@pytest.mark.parametrize("share", [2**-21, 2**-12, 1e38])
def test_a_float32_run_on_another_cpu_may_round_otherwise(share: float, tmp_path: Path) -> None:
    """By a share of the logits, however large they are; not by more than float32's roundings make."""
    weights = random_weights(SMALL, 1)
    weights["head.weight"] *= 100
    checkpoint = write_checkpoint(tmp_path / "step-000000007", SMALL, weights, tensor=2)
    good = read_probe(*open_checkpoint(checkpoint)).results
    noise = torch.randn(good.logits.shape, generator=torch.Generator().manual_seed(7)).clamp(-4, 4)
    logits = good.logits * (1 + share * noise)
    write_tensors(checkpoint / PROBE, probe_tensors(good.tokens, logits, good.codes, validation=False))
    renew_manifest(checkpoint)
    if share < 2**-20:
        list(convert(checkpoint, tmp_path / "model"))
        replay = certificate_of(tmp_path / "model")["replay"]
        assert replay["exact"] and 1e-5 < replay["largest_logit_difference"] <= replay["allowed_logit_error"]
        said = list(check_conversion(checkpoint, tmp_path / "model"))
        assert said[-1].endswith("in float32")
        return
    with pytest.raises(TrainingError, match=r"not the model that was trained.* and 0 of \d+ codes changed"):
        list(convert(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize("damage", ["bit", "tokens", "vocabulary", "hash", "kind", "manifest"])
def test_a_damaged_probe_is_named(damage: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "step-000000007", SMALL, random_weights(SMALL, 1), tensor=1)
    reader, config = open_checkpoint(checkpoint)
    good = read_probe(reader, config)
    assert good.text == "random" and len(good.results.codes) == 9
    path = checkpoint / PROBE
    if damage == "bit":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    else:
        found, codes = good.results, dict(good.results.codes)
        tokens, logits = found.tokens.clone(), found.logits
        if damage == "tokens":
            tokens[0] = 4096
        elif damage == "vocabulary":
            logits = logits[:, :-1].contiguous()
        elif damage == "hash":
            codes["blocks.7.hash_ffn"] = codes.pop("blocks.0.hash_ffn")
        elif damage == "kind":
            tokens = tokens.int()
        write_tensors(path, probe_tensors(tokens, logits, codes, validation=False))
        renew_manifest(checkpoint)
        if damage == "manifest":
            manifest = read_manifest(checkpoint)
            manifest.files.pop(PROBE)
            (checkpoint / MANIFEST).write_text(manifest.to_json())
    reader, config = open_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"probe\.safetensors: .*; use another checkpoint"):
        prove(reader, config, "cpu", "float32", tmp_path)
