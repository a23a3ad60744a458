"""Models with normalised queries and keys and a soft cap of the logits: converted, proved, decoded; and older ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mf_train.config import ModelConfig
from mf_train.errors import UserError
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.decoding import FastPath
from mf_train.standalone.exported.cache import Cache
from mf_train.standalone.exported.names import CONFIG_KEYS
from mf_train.standalone.folder import CERTIFICATE, CONFIG
from mf_train.standalone.use.generate import new_tokens
from mf_train.standalone.use.load import load_model
from tests.standalone.checkpoints import random_weights, write_checkpoint

CAP = 3.0


def write(folder: Path, kind: str = "memoryformer", tensor: int = 1, **regularisers: float) -> Path:
    config = ModelConfig(
        kind=kind,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        bits=4,
        expand_bits=1,
        vocab_size=4096,
        sequence_length=48,
        **regularisers,
    )
    return write_checkpoint(folder / "checkpoint", config, random_weights(config, 3), tensor)


@pytest.mark.parametrize(
    ("kind", "tensor", "dtype"),
    [("memoryformer", 2, "float32"), ("memoryformer", 1, "int8"), ("dense", 1, "float32")],
)
def test_a_conversion_is_proved_and_decodes(kind: str, tensor: int, dtype: str, tmp_path: Path) -> None:
    checkpoint = write(tmp_path, kind, tensor, qk_norm=True, logit_softcap=CAP)
    list(convert(checkpoint, tmp_path / "model", dtype=dtype))
    certificate = json.loads((tmp_path / "model" / CERTIFICATE).read_text())
    if dtype == "float32":
        assert certificate["probe"]["largest_logit_difference"] == 0
    model = load_model(tmp_path / "model")
    ids = torch.randint(4096, (12,), generator=torch.Generator().manual_seed(4)).tolist()
    made = list(new_tokens(model, ids, 8, 0.0, 0, 4096))
    with torch.no_grad():
        logits = model(torch.tensor([ids + made]))[0].float()
        assert 0.5 * CAP < logits.abs().max() < CAP  # it binds
        fast = FastPath().logits(model, torch.tensor(ids[:1]), *_caches(model))
    greedy = logits[len(ids) - 1 : -1].argmax(-1).tolist()
    if dtype == "float32":  # in int8, which computes in bfloat16, equal logits are common
        assert made == greedy
    assert (fast is None) == (kind == "dense")
    if fast is not None:
        torch.testing.assert_close(
            fast[0].float(), logits[0], rtol=0, atol=1e-4 if dtype == "float32" else 0.1
        )


def _caches(model: torch.nn.Module) -> tuple[list[object], list[object]]:
    cache = Cache(model.config.num_layers)
    return cache.keys, cache.values


def test_a_model_that_was_converted_before_loads(tmp_path: Path) -> None:
    """Its config.json lacks every key that came later; one of the first that is missing is an error."""
    list(convert(write(tmp_path), tmp_path / "model"))
    tokens = torch.arange(9)[None]
    expected = load_model(tmp_path / "model")(tokens)
    path = tmp_path / "model" / CONFIG
    tree = json.loads(path.read_text())
    first = "kind hidden_size num_layers num_heads bits expand_bits score temperature norm ffn_inner_norm "
    first += "ffn_activation norm_epsilon rotary_fraction rotary_base vocab_size sequence_length"
    names = {CONFIG_KEYS.get(name, name): name for name in vars(ModelConfig())}
    old = {key: value for key, value in tree.items() if names.get(key) in (None, *first.split())}
    assert len(tree) - len(old) == len(names) - 16 > 10
    path.write_text(json.dumps(old))
    assert torch.equal(load_model(tmp_path / "model")(tokens), expected)
    del old["bits"]
    path.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"config.json: has no key 'bits'; convert the checkpoint again"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_a_cap_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"model\.logit_softcap is .*: it must be a number above 0, or 0"):
        ModelConfig(logit_softcap=value)
