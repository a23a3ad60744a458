"""A converted model under transformers: alone, beside this project, and with every way of generating."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mf_train.checkpoint.layout import PROBE
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import ModelConfig
from mf_train.data.tokenizer import Tokenizer
from mf_train.model.counts import count_parameters
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.conversion.weights import copy_weights
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import INDEX, SINGLE
from mf_train.standalone.use.generate import new_tokens
from mf_train.standalone.use.load import load_model
from tests.standalone.checkpoints import random_weights, write_checkpoint
from tests.standalone.conftest import Trained

ALONE = Path(__file__).with_name("alone.py")
ISSUE_ENVIRONMENT = ["torch", "transformers", "safetensors", "sentencepiece"]

BareEnvironment = Callable[[list[str]], Path]
Report = dict[str, Any]
Results = tuple[Report, dict[str, Tensor]]


@pytest.fixture(scope="module")
def alone(
    float32_two: Trained, bare_environment: BareEnvironment, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    """What alone.py finds where this project is not installed."""
    return run_alone(
        [str(bare_environment(ISSUE_ENVIRONMENT)), "-P"], float32_two, tmp_path_factory.mktemp("a")
    )


def run_alone(python: list[str], trained: Trained, folder: Path, *preloaded: str) -> Results:
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}
    if preloaded:
        environment["PYTHONPATH"] = str(ALONE.parents[3])
    arguments = [str(trained.model), str(trained.checkpoint / PROBE), str(folder / "out"), *preloaded]
    done = subprocess.run(
        [*python, str(ALONE), *arguments],
        cwd=folder,
        env=environment | {"PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text()), load_file(folder / "out.safetensors")


def test_alone_it_computes_what_the_trainer_did(alone: Results, float32_two: Trained) -> None:
    report, results = alone
    recorded = load_file(float32_two.checkpoint / PROBE)
    assert (results["float32.logits"] - recorded["logits"]).abs().max() <= 1e-5
    names = [name for name in recorded if name.startswith("codes.")]
    assert len(names) == 6
    for name in names:
        assert torch.equal(results[f"float32.{name}"], recorded[name]), name
    # in bfloat16 it is another model of nearly the same numbers
    difference = (results["bfloat16.logits"] - recorded["logits"]).abs().max()
    assert 0 < difference < recorded["logits"].abs().max()
    assert report["code"] == "transformers_modules" and report["operators"] == []


def test_alone_it_loads_as_it_was_written(alone: Results, float32_two: Trained) -> None:
    report, _ = alone
    assert report["dtype"] == report["auto_dtype"] == "torch.float32"
    config = load_model(float32_two.model).config
    assert report["parameters"] == count_parameters(config).total
    assert report["tuple"] == [[1, 32, 4160]]
    assert report["loss"] == pytest.approx(report["expected_loss"], rel=1e-6)


def test_alone_the_tokenizer_is_the_trainers(alone: Results, float32_two: Trained) -> None:
    report, _ = alone
    tokenizer = Tokenizer(float32_two.checkpoint / "tokenizer.model")
    assert report["ids"] == [tokenizer.encode(text) for text in report["texts"]]
    assert report["end_of_text"] == tokenizer.end_of_text_id
    assert report["decoded"] == report["texts"]
    assert report["same_ids_without_trust"]
    assert report["special"] == [0, 0, 0]


def test_alone_it_generates(alone: Results, float32_two: Trained) -> None:
    report, _ = alone
    greedy = report["greedy"]
    assert [len(ids) for ids in greedy] == [report["new"]] * 3
    assert report["greedy_without_cache"] == greedy
    assert report["padded"] == greedy and max(report["padding"]) > 0
    assert report["sampled"][0] == report["sampled"][1] != greedy[0]
    assert report["beams"][0] == report["beams"][1]
    tokenizer = Tokenizer(float32_two.model)
    model = load_model(float32_two.model)
    for prompt, ids in zip(report["prompts"], greedy, strict=True):
        ours = new_tokens(model, tokenizer.encode(prompt), report["new"], 0.0, 0, model.config.vocab_size)
        assert list(ours) == ids


def test_beside_this_project_it_is_the_same(alone: Results, float32_two: Trained, tmp_path: Path) -> None:
    """In a process that has this project's model and operators already."""
    report, results = run_alone(
        [sys.executable, "-P"], float32_two, tmp_path, "mf_train.model", "mf_train.kernels"
    )
    assert report.pop("operators") and not alone[0].pop("operators", [])
    assert report == alone[0]
    for name, value in alone[1].items():
        if name.startswith("float32.codes"):
            assert torch.equal(results[name], value), name
        elif name == "float32.logits":  # other kernels: sums in another order
            torch.testing.assert_close(results[name], value, rtol=1e-5, atol=1e-6)


VARIANTS = {
    "other-choices": ModelConfig(
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        bits=3,
        expand_bits=1,
        score="scaled_probability",
        temperature=2.5,
        norm="rmsnorm",
        ffn_inner_norm="rmsnorm",
        ffn_activation="gelu",
        rotary_fraction=0.5,
        vocab_size=4096,
        sequence_length=48,
    ),
    "dense": ModelConfig(
        kind="dense", hidden_size=32, num_layers=2, num_heads=2, vocab_size=4096, sequence_length=40
    ),
    "product keys": ModelConfig(
        ffn="product_key",
        product_keys=24,
        product_query=8,
        product_reads=4,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        bits=4,
        vocab_size=4096,
        sequence_length=40,
    ),
    "hybrid": ModelConfig(
        qkv="low_rank",
        output="memory",
        rank=6,
        residual_rank=4,
        rotation=True,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        bits=4,
        vocab_size=4096,
        sequence_length=40,
    ),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelConfig, dict[str, Tensor], Path]:
    """A configuration, weights, and the model converted from a checkpoint of them."""
    config = VARIANTS[request.param]
    weights = random_weights(config, seed=3)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", config, weights, tensor=2)
    list(convert(checkpoint, tmp_path / "model"))
    return config, weights, tmp_path / "model"


def test_every_choice_of_the_configuration_arrives(
    variant: tuple[ModelConfig, dict[str, Tensor], Path],
) -> None:
    from transformers import AutoModelForCausalLM

    config, weights, folder = variant
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert vars(model.config.to_model_config()) == vars(config)
    assert model.generation_config.temperature in (None, 1.0)  # not the hash's
    state = {name.removeprefix(PARAMETER_PREFIX): value for name, value in model.state_dict().items()}
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    tokens = torch.randint(4096, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = model(tokens).logits
        assert torch.equal(logits, load_model(folder)(tokens))
        cached = model(tokens[:, :4], use_cache=True)
        rest = model(tokens[:, 4:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(torch.cat((cached.logits, rest), 1), logits, rtol=1e-4, atol=1e-4)


def test_a_new_model_and_a_saved_one(
    variant: tuple[ModelConfig, dict[str, Tensor], Path], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config, weights, folder = variant
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(settings, trust_remote_code=True)
    assert 0 < fresh.model.embedding.weight.std() < 0.3 and bool((fresh.model.final_norm.weight == 1).all())
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert vars(again.config) == vars(config)
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


def test_a_missing_weight_is_refused(float32_two: Trained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for path in float32_two.model.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors = load_file(float32_two.model / SINGLE)
    lost = tensors.pop("model.blocks.1.value.tables")
    assert lost.numel()
    (tmp_path / SINGLE).unlink()
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing, such as model.blocks.1.value.tables"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    _, report = AutoModelForCausalLM.from_pretrained(
        float32_two.model, trust_remote_code=True, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_shards_and_their_index(float32_two: Trained, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for path in float32_two.model.iterdir():
        if path.name != SINGLE:
            (tmp_path / path.name).symlink_to(path)
    reader = CheckpointReader(float32_two.checkpoint)
    digests = copy_weights(reader, tmp_path, torch.float32, shard_bytes=400_000)
    assert digests == json.loads((tmp_path / "certificate.json").read_text())["tensors"]
    index = json.loads((tmp_path / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2 and not (tmp_path / SINGLE).exists()
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    whole = load_file(float32_two.model / SINGLE)
    assert index["metadata"] == {
        "total_size": sum(value.nbytes for value in whole.values()),
        "total_parameters": sum(value.numel() for value in whole.values()),
    }
    for file in shards:
        tensors = load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= 400_000
        assert all(index["weight_map"][name] == file for name in tensors)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert all(torch.equal(value, whole[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(load_model(tmp_path).head.weight, whole["model.head.weight"])
