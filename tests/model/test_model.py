"""Forward and backward of every model against the float64 re-implementation, torch's own modules and Pythia's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model import MemoryFormer
from tests.model.reference import logits_of, losses_of
from tests.models import random_model

# The rotary angles are float32 by design; everything else is float64.
TOLERANCE = 1e-5


def random_tokens(config: ModelConfig, seed: int, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = -100
    return tokens[:, :-1], targets


def assert_relative(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= tolerance, (name, error.item())


PRODUCT = {"product_keys": 5, "product_heads": 3, "product_query": 6, "product_reads": 2}
CASES = {
    "paper": {},
    "released": {"score": "scaled_probability", "norm": "rmsnorm", "temperature": 1.4},
    "rmsnorm everywhere": {"norm": "rmsnorm", "ffn_inner_norm": "rmsnorm", "expand_bits": 0},
    "rmsnorm inside": {"ffn_inner_norm": "rmsnorm", "temperature": 0.6, "rotary_fraction": 1.0},
    "gelu": {"ffn_activation": "gelu", "expand_bits": 1, "num_heads": 4},
    "relu": {"ffn_activation": "relu", "score": "scaled_probability", "rotary_fraction": 0.0},
    "dense": {"kind": "dense"},
    "regularisers": {"qk_norm": True, "logit_softcap": 2.0, "num_heads": 4, "rotary_fraction": 1.0},
    "dense regularisers": {"kind": "dense", "qk_norm": True, "logit_softcap": 2.0},
    "low rank": {"kind": "dense", "qkv": "low_rank", "ffn": "low_rank", "output": "low_rank", "rank": 5},
    "low rank beside tables": {"residual_rank": 4, "output": "memory"},
    "matrices in attention": {"qkv": "dense", "output": "low_rank", "rank": 7, "ffn_activation": "relu"},
    "matrices in the FFN": {"ffn": "dense", "output": "memory", "score": "scaled_probability"},
    "memory in one place": {"kind": "dense", "output": "memory", "norm": "rmsnorm", "bits": 4},
    "rotated": {"rotation": True, "output": "memory", "expand_bits": 1, "residual_rank": 2},
    "product keys": {"ffn": "product_key"} | PRODUCT,
    "product keys and matrices": {"kind": "dense", "ffn": "product_key"} | PRODUCT | {"product_reads": 5},
    "dense rmsnorm": {"kind": "dense", "norm": "rmsnorm", "num_heads": 3, "rotary_base": 100.0},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient(case: str) -> None:
    settings = {
        "hidden_size": 24,
        "num_layers": 2,
        "num_heads": 2,
        "bits": 3,
        "vocab_size": 37,
        **CASES[case],
    }
    config = ModelConfig(**settings)
    seed = sorted(CASES).index(case)
    model = random_model(config, seed)
    tokens, targets = random_tokens(config, seed + 100, 2, 9)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}

    expected_logits = logits_of(weights, config, tokens)
    expected = losses_of(expected_logits, targets)
    logits, losses = model(tokens), model(tokens, targets)
    assert_relative(logits, expected_logits, TOLERANCE)
    assert_relative(losses, expected, TOLERANCE)
    assert (losses[targets == -100] == 0).all() and (targets == -100).any()

    share = torch.rand(losses.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gradients = torch.autograd.grad((losses * share).sum(), list(model.parameters()))
    expected_gradients = torch.autograd.grad((expected * share).sum(), list(weights.values()))
    assert len(gradients) == len(weights)
    for name, ours, theirs in zip(weights, gradients, expected_gradients, strict=True):
        if name.endswith("key.bias"):  # adds the same to every score, but for the rotation
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        else:
            assert_relative(ours, theirs, TOLERANCE, name)


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
def test_narrow_types_come_close(dtype: torch.dtype, tolerance: float, kind: str) -> None:
    """From the same rounded weights. In bfloat16 some codes flip, so tables are small beside the embedding."""
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 5, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks") and parameter.dim() > 1:
                parameter.mul_(0.1)
    tokens, targets = random_tokens(config, 6, 2, 12)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = logits_of(weights, config, tokens)
    logits = model(tokens)
    losses = model.head.token_losses(logits, targets)
    assert (logits.dtype, losses.dtype) == (dtype, torch.float32)
    assert_relative(logits, expected, tolerance)
    assert_relative(losses, losses_of(logits.double(), targets), 1e-6)


def test_dense_peer_against_torch_modules() -> None:
    config = ModelConfig(
        kind="dense", hidden_size=48, num_layers=1, num_heads=3, vocab_size=61, rotary_fraction=0
    )
    model = random_model(config, 8)
    tokens, targets = random_tokens(config, 9, 3, 20)
    w = dict(model.named_parameters())

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"blocks.0.{name}.weight"], w[f"blocks.0.{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (48,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)

    x = F.embedding(tokens, w["embedding.weight"])
    h = norm(x, "blocks.0.norm_attention")
    q, k, v = (linear(h, n).view(3, 20, 3, 16).transpose(1, 2) for n in ("query", "key", "value"))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(3, 20, 48)
    z = x + linear(attended, "output")
    y = z + linear(F.gelu(linear(norm(z, "blocks.0.norm_ffn"), "up")), "down")
    logits = F.linear(norm(y, "final_norm"), w["head.weight"])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    losses = model(tokens, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(losses.sum(), parameters)
    theirs = torch.autograd.grad(expected.sum(), parameters)
    for name, a, b in zip(w, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_dense_peer_is_pythia_with_sequential_residuals() -> None:
    """`transformers`' GPT-NeoX, the family Pythia is of, with our weights gives our logits."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = ModelConfig(kind="dense", hidden_size=48, num_layers=2, num_heads=3, vocab_size=61)
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=61,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=192,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            use_parallel_residual=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            tie_word_embeddings=False,
        )
    ).double()
    ours = random_model(config, 10)
    w = dict(ours.named_parameters())
    state = {"embed_in.weight": w["embedding.weight"]}
    names = {
        "norm_attention": "input_layernorm",
        "norm_ffn": "post_attention_layernorm",
        "output": "attention.dense",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    for kind in ("weight", "bias"):
        state[f"final_layer_norm.{kind}"] = w[f"final_norm.{kind}"]
        for layer in range(2):
            for ours_name, name in names.items():
                state[f"layers.{layer}.{name}.{kind}"] = w[f"blocks.{layer}.{ours_name}.{kind}"]
            # queries, keys and values of a head lie side by side
            parts = [w[f"blocks.{layer}.{n}.{kind}"].unflatten(0, (3, 16)) for n in ("query", "key", "value")]
            joined = torch.stack(parts, dim=1).flatten(0, 2)
            state[f"layers.{layer}.attention.query_key_value.{kind}"] = joined
    theirs.base_model.load_state_dict(state)
    theirs.get_output_embeddings().weight = w["head.weight"]
    tokens, _ = random_tokens(config, 11, 2, 30)
    assert_relative(ours(tokens), theirs(tokens).logits, TOLERANCE)


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_a_later_token_changes_nothing_before_it(kind: str) -> None:
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 12)
    tokens, _ = random_tokens(config, 13, 1, 16)
    before = model(tokens)
    for position in (5, 15):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 1) % 50
        after = model(changed)
        assert torch.equal(after[:, :position], before[:, :position])
        assert ((after - before)[0, position:].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_sequences_of_a_batch_do_not_mix(kind: str) -> None:
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=2, bits=4, vocab_size=50)
    model = random_model(config, 14)
    tokens, _ = random_tokens(config, 15, 3, 8)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(model(tokens), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_compiled_with_aot_autograd(kind: str) -> None:
    """`torch.compile` traces forward and backward whole and changes no number beyond rounding."""
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=1, num_heads=2, bits=4, vocab_size=48)
    model = random_model(config, 16)
    tokens, targets = random_tokens(config, 17, 2, 8)
    expected = model(tokens, targets)
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses = compiled(tokens, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(losses.sum(), list(model.parameters())), gradients, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ffn": "product"}, "model.ffn is 'product': choose one of memory, dense, low_rank, product_key"),
        ({"qkv": "product_key"}, "model.qkv is 'product_key': choose one of memory, dense, low_rank"),
        ({"ffn": "low_rank"}, "model.rank is missing and layers are low_rank: give a number from 1 to"),
        ({"ffn": "low_rank", "rank": 24}, "model.rank is 24 .* = 23"),
        ({"rank": 3}, "model.rank is 3 and no layer is low_rank: leave it out"),
        ({"residual_rank": 24}, "model.residual_rank is 24: give a number up to .* = 23, or 0"),
        (
            {"kind": "dense", "residual_rank": 2},
            "model.residual_rank is 2 and the model has no memory layers",
        ),
        ({"kind": "dense", "rotation": True}, "model.rotation is true and the model has no memory layers"),
        ({"product_keys": 0}, "model.product_keys is 0: it must be at least 1"),
        ({"ffn": "product_key", "product_query": 5}, "model.product_query is 5: it must be even"),
        (
            {"ffn": "product_key", "product_keys": 4, "product_reads": 5},
            "product_reads 5 is more than model.product_keys 4",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(keys: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(hidden_size=24, bits=3, num_heads=2, **keys)  # type: ignore[arg-type]


def test_a_rotation_turns_each_table_s_features_and_begins_as_none() -> None:
    keys = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "bits": 3, "vocab_size": 37}
    plain, turned = (MemoryFormer(ModelConfig(**keys, rotation=each), seed=4) for each in (False, True))  # type: ignore[arg-type]
    tokens, _ = random_tokens(plain.config, 5, 2, 9)
    assert torch.equal(turned(tokens), plain(tokens))
    rotation = random_model(turned.config, 6).blocks[0].rotate_ffn
    x = torch.randn(4, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    y = rotation(x)
    torch.testing.assert_close(y.view(4, 8, 3).norm(dim=-1), x.view(4, 8, 3).norm(dim=-1))
    assert (y - x).norm() > 0.1 * x.norm()
    changed = x.clone()
    changed[:, 3:6] += 1.0  # of the second table
    assert torch.equal(rotation(changed)[:, :3], y[:, :3]) and torch.equal(rotation(changed)[:, 6:], y[:, 6:])
