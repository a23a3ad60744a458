"""Converted models of every kind of attention under transformers: caches, padding, beams, and what is refused."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model.attention.kinds import KINDS
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.decoding import FastPath
from mf_train.standalone.exported.cache import Cache
from mf_train.standalone.use.generate import new_tokens
from mf_train.standalone.use.load import load_model
from tests.standalone.checkpoints import certificate_of, random_weights, write_checkpoint

NEW = 20
STATES = [kind for kind in KINDS if kind != "softmax"]
MODELS: dict[str, dict[str, Any]] = {kind: {"attention": kind} for kind in STATES}
# softmax in one of the blocks
MODELS["window, mixed"] = {"attention": "window", "full_attention_layers": (1,)}
MODELS["flow, mixed"] = {"attention": "flow", "full_attention_layers": (0,)}


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig(
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        bits=4,
        expand_bits=1,
        vocab_size=4096,
        sequence_length=48,
        attention_window=6,
        attention_segment=7,
        attention_rank=3,
        attention_slots=5,
        **MODELS[request.param],
    )
    folder = tmp_path_factory.mktemp("models")
    checkpoint = write_checkpoint(folder / "checkpoint", config, random_weights(config, seed=11), tensor=2)
    list(convert(checkpoint, folder / "model"))
    return folder / "model"


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(1, 4096, (batch, length), generator=torch.Generator().manual_seed(length))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    found: Tensor = model.generate(ids, attention_mask=mask, **options)
    return found[:, ids.shape[1] :]


def test_the_configuration_arrives(folder: Path, model: Any) -> None:
    plain = load_model(folder)
    assert asdict(model.config.to_model_config()) == asdict(plain.config)
    assert plain.config.attention != "softmax"
    assert certificate_of(folder)
    ids = tokens(2, 30)
    assert torch.equal(model(ids).logits, plain(ids))


def test_greedy_tokens_with_cache_and_without(folder: Path, model: Any) -> None:
    ids = tokens(2, 11)
    expected = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), expected)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), expected)
    plain = load_model(folder)
    for row, prompt in zip(expected.tolist(), ids.tolist(), strict=True):
        assert list(new_tokens(plain, prompt, NEW, 0.0, 0, plain.config.vocab_size)) == row


def test_a_padded_batch_is_its_rows(model: Any) -> None:
    ids = tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found = generate(model, ids, mask)
    assert torch.equal(found[:1], generate(model, ids[:1]))
    assert torch.equal(found[1:], generate(model, ids[1:, 5:]))


def test_beams_and_samples(model: Any) -> None:
    """A beam's cache is reordered at each step: as without one."""
    ids = tokens(2, 9)
    options = {"num_beams": 3, "num_return_sequences": 2}
    found = generate(model, ids, **options)
    assert found.shape == (4, NEW) and torch.equal(found, generate(model, ids, use_cache=False, **options))
    torch.manual_seed(0)
    drawn = [generate(model, ids, do_sample=True, num_return_sequences=3, use_cache=c) for c in (True, True)]
    assert drawn[0].shape == (6, NEW) and not torch.equal(*drawn)


def test_a_cache_goes_on(model: Any) -> None:
    """Of one's own, empty or from an earlier call; repeated and selected rows."""
    from transformers import DynamicCache

    ids = tokens(2, 14)
    with torch.no_grad():
        expected = model(ids).logits
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            held = model(ids[:, :9], past_key_values=cache).past_key_values
            assert held is cache and cache.get_seq_length() == 9
            logits = model(ids[:, 9:], past_key_values=cache).logits
            torch.testing.assert_close(logits, expected[:, 9:], rtol=1e-4, atol=1e-4)
        cache = model(ids[:, :9]).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 0]))
        logits = model(ids[:, 9:].flip(0), past_key_values=cache).logits
        torch.testing.assert_close(logits, expected[:, 9:].flip(0), rtol=1e-4, atol=1e-4)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)


def test_training_under_transformers(model: Any) -> None:
    """Gradients are those without checkpointed blocks."""
    ids, found = tokens(2, 20), []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        model.train()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
    model.activation_checkpointing_disable()
    model.eval()
    assert all(map(torch.equal, *found))


def test_what_is_refused(model: Any) -> None:
    from transformers import StaticCache

    ids = tokens(1, 6)
    static = StaticCache(config=model.config, max_cache_len=32)
    with pytest.raises(
        ValueError, match=r"StaticCache and model\.attention is \w+, whose state it cannot hold"
    ):
        model(ids, past_key_values=static)
    with pytest.raises(ValueError, match="whose state it cannot hold"):
        generate(model, ids, cache_implementation="static")
    with pytest.raises(ValueError, match=r"model\.attention is \w+, which has no weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"4 dimensions and model\.attention is"):
        model(ids, attention_mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    with pytest.raises(ValueError, match="continuous batching pages keys and values"):
        model(ids, cache=object(), position_ids=torch.arange(6)[None])
    cache = model(ids).past_key_values
    with pytest.raises(ValueError, match=r"crop\(-1\): this attention keeps a state"):
        cache.crop(-1)


def test_the_library_in_c_leaves_it_alone(folder: Path) -> None:
    plain, cache = load_model(folder), Cache(3)
    with torch.no_grad():
        assert FastPath().logits(plain, torch.tensor([5]), cache.keys, cache.values) is None
