"""What a run records for its conversion: on its own validation text, the same from every number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mf_train.checkpoint.layout import CONFIG, PROBE, TOKENIZER, resolve_checkpoint
from mf_train.checkpoint.probe import PROBE_TOKENS, probe_length, random_tokens
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile
from mf_train.config import ModelConfig
from mf_train.config.loading import load_config
from mf_train.data.stream.validation import validation_tokens
from mf_train.data.tokenizer import Tokenizer
from mf_train.standalone.conversion.streamed_model import CheckpointWeights, compute, streamed_model
from tests.training.runs import small_config, train, write_text


@pytest.mark.parametrize(("validation", "tensor"), [(True, 2), (False, 1)])
def test_the_probe_is_what_the_saved_weights_compute(validation: bool, tensor: int, tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["training"] |= {"steps": 2, "validation_interval": 2 if validation else 0}
    tree["model"]["sequence_length"] = 48
    train(tree, f"parallel.tensor={tensor}", processes=tensor)
    checkpoint = resolve_checkpoint(tmp_path / "run")
    config = load_config(checkpoint / CONFIG)
    with TensorFile(checkpoint / PROBE) as file:
        probe = {name: file.read(name) for name in file.tensors}
    if validation:
        tokenizer = Tokenizer(checkpoint / TOKENIZER)
        text = validation_tokens(config.data.validation, config.data, tokenizer, 48, limit=1)
        assert probe["tokens"].tolist() == text[:48].tolist()
    else:
        assert torch.equal(probe["tokens"], random_tokens(config.model))
    assert probe["validation"].tolist() == [validation] and len(probe["tokens"]) == 48
    model = streamed_model(config.model, CheckpointWeights(CheckpointReader(checkpoint), "float32"))
    found = compute(model, probe["tokens"])
    torch.testing.assert_close(found.logits, probe["logits"], rtol=0, atol=1e-6)
    recorded = {name.removeprefix("codes."): probe[name] for name in probe if name.startswith("codes.")}
    assert recorded.keys() == found.codes.keys() and len(recorded) == 6
    assert all(torch.equal(recorded[name], found.codes[name]) for name in recorded)


def test_random_tokens_are_always_the_same() -> None:
    config = ModelConfig(sequence_length=2048, vocab_size=50304)
    assert probe_length(config) == PROBE_TOKENS == 128
    assert random_tokens(config)[:3].tolist() == [41516, 10671, 1781]
    for vocabulary, length in (
        (65_536, 128),
        (262_144, 32),
        (1_000_000, 16),
    ):  # 32 MiB of logits, or 16 tokens
        wide = ModelConfig(sequence_length=2048, vocab_size=vocabulary)
        assert probe_length(wide) == length == len(random_tokens(wide))
    assert (
        probe_length(ModelConfig(sequence_length=24))
        == 24
        == len(random_tokens(ModelConfig(sequence_length=24)))
    )
