"""The C++ decoder against the plain model: logits, caches, tokens; when it is used and when it is not."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train import kernels
from mf_train.config import ModelConfig
from mf_train.kernels import cpu, hash_codes, lookup, lookup_all
from mf_train.model import MemoryFormer
from mf_train.model.quantized import Int8Lookup, use_int8
from mf_train.standalone import decoding
from mf_train.standalone.decoding import FastPath
from mf_train.standalone.exported import installed
from mf_train.standalone.exported.cache import Cache, Growing
from mf_train.standalone.use.generate import new_tokens
from tests.model.reference import logits_of
from tests.models import random_model
from tests.threads import threads

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=f"no C++ operation: {cpu.reason()}")

SMALL: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "vocab_size": 97, "sequence_length": 96}
CONFIGS = {
    "paper": ModelConfig(**SMALL, hidden_size=64, bits=4, expand_bits=1),
    "odd": ModelConfig(
        **SMALL | {"num_heads": 3},
        hidden_size=60,
        bits=5,
        norm="rmsnorm",
        score="scaled_probability",
        ffn_activation="gelu",
        qk_norm=True,
        logit_softcap=5.0,
    ),
    "other": ModelConfig(
        **SMALL,
        hidden_size=42,
        bits=7,
        expand_bits=0,
        ffn_inner_norm="rmsnorm",
        ffn_activation="relu",
        rotary_fraction=0.5,
        temperature=0.7,
    ),
    "wide": ModelConfig(
        **SMALL | {"num_layers": 1}, hidden_size=1088, bits=1, expand_bits=1, rotary_fraction=0
    ),
}


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def exactly_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain model on torch operations, its hash and a single query's attention computed in float64.

    What the decoder computes rounds as these do, so bfloat16 agrees to the bit: otherwise a rounding that falls the
    other way changes a code now and then, and with it everything after.
    """
    for name, function, backend in (
        ("hash_codes", hash_codes, "reference"),
        ("lookup", lookup, "composition"),
        ("lookup_all", lookup_all, "composition"),
    ):
        monkeypatch.setattr(f"mf_train.model.memory.{name}", partial(function, backend=backend))
    monkeypatch.setattr("mf_train.model.norm.fast_norm", lambda _: None)
    rms_norm = F.rms_norm
    monkeypatch.setattr(
        F, "rms_norm", lambda x, *sizes, **options: rms_norm(x.double(), *sizes, **options).to(x.dtype)
    )
    in_dtype = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.shape[2] > 1:
            return in_dtype(query, key, value, **options)
        return in_dtype(query.double(), key.double(), value.double(), **options).to(query.dtype)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


def frozen_model(config: ModelConfig, dtype: torch.dtype, seed: int) -> MemoryFormer:
    """Weights far from the initial ones; dtype torch.int8: bfloat16 with int8 tables and head."""
    model = random_model(config, seed, torch.float32, std=0.3).requires_grad_(False)
    return use_int8(model.bfloat16()) if dtype == torch.int8 else model.to(dtype)


def random_tokens(config: ModelConfig, batch: int, length: int, seed: int) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def decode(fast: FastPath, model: MemoryFormer, token_ids: Tensor, cache: Cache) -> Tensor:
    logits = fast.logits(model, token_ids, cache.keys, cache.values)
    assert logits is not None
    return logits


@pytest.mark.parametrize("batch", [1, 3, 8, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_float32_tokens_and_logits_are_the_plain_models(name: str, batch: int) -> None:
    config = CONFIGS[name]
    model = frozen_model(config, torch.float32, seed=batch)
    prompt = random_tokens(config, batch, 1 if batch == 3 else 9, seed=1)
    plain, ours, fast = Cache(config.num_layers), Cache(config.num_layers), FastPath()
    model(prompt, cache=plain)
    if prompt.shape[1] > 1:
        model(prompt, cache=ours)
    else:
        decode(fast, model, prompt[:, 0], ours)  # a prompt of one token, into an empty cache
    token = prompt[:, -1]
    steps = 16 if name == "wide" else 64
    for _ in range(steps):
        expected = model(token.unsqueeze(1), cache=plain)[:, 0]
        found = decode(fast, model, token, ours)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        token = expected.argmax(-1)
    assert ours.get_seq_length() == plain.get_seq_length() == prompt.shape[1] + steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_bfloat16_caches_are_equal_to_the_bit(name: str, dtype: torch.dtype, exactly_rounded: None) -> None:
    config = CONFIGS[name]
    model = frozen_model(config, dtype, seed=2)
    prompt = random_tokens(config, 3, 7, seed=3)
    plain, ours, fast = Cache(config.num_layers), Cache(config.num_layers), FastPath()
    token = model(prompt, cache=plain)[:, -1].argmax(-1)
    model(prompt, cache=ours)
    for _ in range(24):
        if (
            dtype == torch.int8
        ):  # the composition sums int8 rows in no fixed order: each step from equal caches
            ours = copy.deepcopy(plain)
        expected = model(token.unsqueeze(1), cache=plain)[:, 0].float()
        found = decode(fast, model, token, ours).float()
        equal = [
            torch.equal(part.held(), other.held())
            for part, other in zip((*plain.keys, *plain.values), (*ours.keys, *ours.values), strict=True)
        ]
        if dtype == torch.bfloat16:
            assert all(equal)
            # the head's sums have another order, so a logit may round to the neighbour
            assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()
            picked = expected.gather(1, found.argmax(-1, keepdim=True))
            assert (expected.amax(-1) - picked[:, 0] <= 2**-7 * expected.abs().max()).all()
        else:
            assert (found - expected).square().mean() <= 0.01 * expected.square().mean()
        token = expected.argmax(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_against_the_reference_in_float64(name: str) -> None:
    config = CONFIGS[name]
    model = frozen_model(config, torch.float32, seed=4)
    tokens = random_tokens(config, 2, 6, seed=5)
    weights = {key: value.double() for key, value in model.state_dict().items()}
    expected = logits_of(weights, config, tokens)
    cache, fast = Cache(config.num_layers), FastPath()
    for position in range(tokens.shape[1]):
        found = decode(fast, model, tokens[:, position], cache)
        largest = expected[:, position].abs().max()
        assert (found - expected[:, position]).abs().max() <= 2e-5 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_any_number_of_threads_gives_the_same_bits(dtype: torch.dtype) -> None:
    config = CONFIGS["odd"]
    model = frozen_model(config, dtype, seed=6)
    results = []
    for number in (1, 2, 5):
        with threads(number):
            cache, fast = Cache(config.num_layers), FastPath()
            tokens = random_tokens(config, 9, 8, seed=7)
            results.append(torch.stack([decode(fast, model, tokens[:, i], cache) for i in range(8)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    config = CONFIGS["paper"]
    model = frozen_model(config, torch.bfloat16, seed=8)
    tokens = random_tokens(config, 13, 12, seed=9)
    caches = [Cache(config.num_layers) for _ in range(3)]
    fast = FastPath()
    for position in range(tokens.shape[1]):
        step = tokens[:, position]
        together = decode(fast, model, step, caches[0])
        assert torch.equal(decode(fast, model, step[:1], caches[1])[0], together[0])
        assert torch.equal(decode(fast, model, step[5:12], caches[2]), together[5:12])


def test_positions_beyond_the_trained_ones_and_a_cache_that_grows() -> None:
    config = CONFIGS["other"]
    model = frozen_model(config, torch.float32, seed=10)
    tokens = random_tokens(config, 1, 700, seed=11)
    plain, ours, fast = Cache(config.num_layers), Cache(config.num_layers), FastPath()
    model(tokens[:, :600], cache=plain)
    model(tokens[:, :600], cache=ours)
    for position in range(600, 700):  # with more than one block of positions in attention
        expected = model(tokens[:, position : position + 1], cache=plain)[:, 0]
        found = decode(fast, model, tokens[:, position], ours)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_weights_that_change_are_noticed() -> None:
    config = CONFIGS["paper"]
    model, other = (frozen_model(config, torch.float32, seed) for seed in (12, 13))
    tokens = random_tokens(config, 2, 1, seed=14)[:, 0]
    fast = FastPath()

    def check(dtype: torch.dtype = torch.float32) -> None:
        expected = model(tokens.unsqueeze(1))[:, 0].float()
        found = decode(fast, model, tokens, Cache(config.num_layers))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.02 * expected.abs().max().item())

    check()
    model.load_state_dict(other.state_dict())  # in place
    check()
    model.load_state_dict({k: v.clone() * 1.5 for k, v in other.state_dict().items()}, assign=True)
    check()
    model.blocks[1].key = copy.deepcopy(other.blocks[0].value)
    check()
    model.blocks[0].up = Int8Lookup(model.blocks[0].up)
    model.blocks[0].up.scales.mul_(2)
    check()
    model.head.weight.data = other.head.weight.data.flip(0).contiguous()
    check()
    model.to(torch.bfloat16)
    model.blocks[0].up = copy.deepcopy(other.blocks[0].up).bfloat16()
    assert decode(fast, model, tokens, Cache(config.num_layers)).dtype == torch.bfloat16
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(
            decode(copied, model, tokens, Cache(config.num_layers)),
            decode(fast, model, tokens, Cache(config.num_layers)),
        )


def test_what_it_does_not_know_takes_the_plain_path() -> None:
    config = CONFIGS["paper"]
    model = frozen_model(config, torch.float32, seed=15)
    tokens = torch.tensor([3])

    def refused(model: MemoryFormer, tokens: Tensor = tokens) -> bool:
        cache = Cache(model.config.num_layers)
        return FastPath().logits(model, tokens, cache.keys, cache.values) is None

    assert not refused(model)
    assert refused(model.double()) and not refused(model.float())
    assert refused(model, torch.zeros(17, dtype=torch.int64)) and refused(model, tokens[:0])
    with torch.enable_grad():
        assert refused(model)
    handle = model.blocks[0].query.register_forward_hook(lambda *_: None)
    assert refused(model)
    handle.remove()
    assert not refused(model)
    model.blocks[0].query.forward = lambda *_: torch.zeros(64)  # as libraries that wrap modules do
    assert refused(model)
    assert refused(MemoryFormer(ModelConfig(**SMALL, kind="dense", hidden_size=32)))
    with torch.device("meta"):
        assert refused(MemoryFormer(config))
    fast, uneven = FastPath(), Cache(config.num_layers)
    uneven.keys[1].append(torch.zeros(1, 2, 1, 32))
    good = frozen_model(config, torch.float32, seed=15)
    assert fast.logits(good, tokens, uneven.keys, uneven.values) is None
    with pytest.raises(IndexError, match=r"token ids \[97\] must be from 0 to 96"):
        decode(fast, good, torch.tensor([97]), Cache(config.num_layers))


def test_new_tokens_are_those_of_the_whole_prefix_each_time() -> None:
    config = CONFIGS["odd"]
    model = frozen_model(config, torch.float32, seed=16)
    ids = random_tokens(config, 1, 5, seed=17)[0].tolist()
    expected = list(ids)
    for _ in range(20):
        expected.append(int(model(torch.tensor([expected]))[0, -1, :90].argmax()))
    assert list(new_tokens(model, ids, 20, 0.0, 0, 90)) == expected[5:]


def test_growing_holds_what_torch_cat_gives() -> None:
    generator = torch.Generator().manual_seed(18)
    growing, whole = Growing(), torch.empty(2, 3, 0, 4)
    for count in (5, 1, 1, 70, 1, 200, 1):
        part = torch.randn(2, 3, count, 4, generator=generator)
        whole = torch.cat((whole, part), 2)
        assert torch.equal(growing.append(part), whole)
    buffer = growing.buffer
    growing.hold(growing.held()[:, :, :50])
    assert growing.buffer is buffer and torch.equal(
        growing.append(part), torch.cat((whole[:, :, :50], part), 2)
    )
    growing.hold(whole.index_select(0, torch.tensor([1, 0, 1])))
    part = part[[0, 0, 1]]
    assert torch.equal(growing.append(part), torch.cat((whole[[1, 0, 1]], part), 2))
    with pytest.raises(RuntimeError):
        growing.append(torch.zeros(1, 3, 1, 4))  # another batch
    with torch.enable_grad():
        leaf = torch.ones(3, 3, 1, 4, requires_grad=True)
        growing.append(leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    with torch.inference_mode():
        frozen = Growing()
        frozen.append(torch.zeros(1, 1, 2, 4))
    assert frozen.append(torch.ones(1, 1, 1, 4)).sum() == 4


def test_a_folder_uses_this_package_only_if_it_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed.DECODING is decoding and decoding.INTERFACE == installed.INTERFACE
    assert installed.KERNELS is kernels
    monkeypatch.setattr(decoding, "INTERFACE", installed.INTERFACE + 1)
    copied = importlib.util.spec_from_file_location("installed_copy", installed.__file__)
    again = importlib.util.module_from_spec(copied)
    copied.loader.exec_module(again)
    assert again.DECODING is None and again.KERNELS is None


class TestTransformers:
    @pytest.fixture
    def model(self, tmp_path: Path) -> Any:
        from mf_train.standalone.exported.configuration_memoryformer import MemoryFormerConfig
        from mf_train.standalone.exported.modeling_memoryformer import MemoryFormerForCausalLM

        config = MemoryFormerConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, bits=4, expand_bits=1, vocab_size=97
        )
        model = MemoryFormerForCausalLM(config).eval()
        model.model.load_state_dict(frozen_model(model.model.config, torch.float32, seed=19).state_dict())
        return model

    def generate(self, model: Any, ids: Tensor, fast: bool, **options: Any) -> Tensor:
        model._fast_path = FastPath() if fast else None
        made = model.generate(
            ids, max_new_tokens=24, min_new_tokens=24, eos_token_id=0, pad_token_id=0, **options
        )
        if fast:
            assert model._fast_path._decoder is not None
        return made

    @pytest.mark.parametrize(
        "options", [{}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.7}], ids=str
    )
    def test_generate_gives_the_same_with_and_without(self, model: Any, options: dict[str, Any]) -> None:
        ids = random_tokens(model.model.config, 3, 6, seed=20)
        results = []
        for fast in (True, False):
            torch.manual_seed(21)
            results.append(self.generate(model, ids, fast, **options))
        assert torch.equal(*results)

    def test_padding(self, model: Any) -> None:
        """Padded sequences take the plain path, which gives what each gives alone."""
        ids = random_tokens(model.model.config, 2, 8, seed=22)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        padded = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, eos_token_id=0, pad_token_id=0
        )
        assert torch.equal(padded[0, 8:], self.generate(model, ids[:1, 3:], True)[0, 5:17])
        assert torch.equal(padded[1, 8:], self.generate(model, ids[1:], True)[0, 8:20])

    def test_caches_of_every_origin(self, model: Any) -> None:
        from transformers import DynamicCache

        ids = random_tokens(model.model.config, 2, 30, seed=23)
        whole = model(ids).logits
        held = model(ids[:, :10], use_cache=True).past_key_values
        parts = [model(ids[:, i : i + 1], past_key_values=held).logits for i in range(10, 20)]
        held.crop(-5)
        parts[5:] = [model(ids[:, i : i + 1], past_key_values=held).logits for i in range(15, 20)]
        plain = DynamicCache()  # with keys and values that another model's code appended
        for layer, (key, value, *_) in enumerate(held):
            plain.update(key.clone(), value.clone(), layer)
        held.batch_select_indices(torch.tensor([1]))
        found = model(ids[1:, 20:21], past_key_values=held).logits
        torch.testing.assert_close(found, whole[1:, 20:21], rtol=1e-4, atol=1e-5)
        parts += [model(ids[:, 20:23], past_key_values=plain).logits]
        parts += [model(ids[:, i : i + 1], past_key_values=plain).logits for i in range(23, 30)]
        torch.testing.assert_close(torch.cat(parts, 1), whole[:, 10:], rtol=1e-4, atol=1e-5)
        assert plain.get_seq_length() == 30 and held.get_seq_length() == 21
        copied = copy.deepcopy(plain)
        assert torch.equal(copied.layers[1].keys, plain.layers[1].keys)
        plain.reset()
        assert plain.get_seq_length() == 0

    def test_logits_to_keep(self, model: Any) -> None:
        ids = random_tokens(model.model.config, 2, 9, seed=24)
        whole = model(ids).logits
        assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 97)
        torch.testing.assert_close(model(ids, logits_to_keep=4).logits, whole[:, -4:])
        assert torch.equal(model(ids).logits, whole)
        with pytest.raises(ValueError, match="logits_to_keep is 1: labels need"):
            model(ids, labels=ids, logits_to_keep=1)

    def test_gradients_flow_through_a_cache(self, model: Any) -> None:
        ids = random_tokens(model.model.config, 1, 6, seed=25)
        gradients = []
        with torch.enable_grad():
            for cut in (6, 5):
                model.zero_grad()
                held = model(ids[:, :cut], use_cache=True)
                logits = (
                    held.logits[:, -1]
                    if cut == 6
                    else model(ids[:, 5:], past_key_values=held.past_key_values).logits[:, -1]
                )
                logits.square().sum().backward()
                gradients.append(model.model.blocks[0].value.tables.grad.clone())
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
