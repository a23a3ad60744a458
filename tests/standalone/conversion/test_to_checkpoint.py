"""A standalone model becomes a checkpoint, from which training goes on and the same model is converted."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mf_train.checkpoint.layout import CONFIG, TOKENIZER
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.verify import find_damage, verify
from mf_train.config import Config, DataConfig, ModelConfig, TokenizerConfig
from mf_train.config.loading import config_to_tree, load_config
from mf_train.errors import UserError
from mf_train.standalone.conversion import weights as weights_module
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.conversion.to_checkpoint import to_checkpoint
from mf_train.standalone.folder import SINGLE
from tests.standalone.checkpoints import certificate_of, random_weights, renew_manifest, write_checkpoint
from tests.training.runs import read_metrics, small_config, train, write_text

SMALL = ModelConfig(hidden_size=32, num_layers=2, num_heads=4, bits=4, vocab_size=4096, sequence_length=32)
DENSE = ModelConfig(
    kind="dense", hidden_size=32, num_layers=1, num_heads=4, vocab_size=4096, sequence_length=32
)
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A converted model of a dtype, made once; do not change it."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint = write_checkpoint(folder / "step-000000007", SMALL, random_weights(SMALL, 1), tensor=2)

    def model(dtype: str) -> Path:
        if not (folder / dtype).exists():
            list(convert(checkpoint, folder / dtype, dtype))
        return folder / dtype

    return model


@pytest.fixture
def model(models: Models, tmp_path: Path) -> Path:
    """A float32 model of its own for a test that changes it."""
    return Path(shutil.copytree(models("float32"), tmp_path / "model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_way_there_and_back_changes_no_bit(
    models: Models, dtype: str, tensor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "SLICE_BYTES", 5000)  # several slices of most parameters
    monkeypatch.setattr("mf_train.standalone.conversion.to_checkpoint.SLICE_BYTES", 5000)
    original, there, back = models(dtype), tmp_path / "there", tmp_path / "back"
    lines = list(to_checkpoint(original, there, tensor))
    assert f"checkpoint.resume={there}" in lines[-1]
    (line,) = verify(there)
    assert f"step 0, tensor-parallel {tensor}, without moments" in line
    reader = CheckpointReader(there)
    stored = load_file(original / SINGLE)
    for name in reader.shapes:
        assert torch.equal(reader.read(name), stored[f"model.{name}"].float()), name
        assert not reader.read(name, "exp_avg_sq").any()
    assert reader.state() == {"step": 0, "tokens": 0, "device": "cpu", "stream": None}
    assert (there / TOKENIZER).read_bytes() == (original / TOKENIZER).read_bytes()

    list(convert(there, back))  # its precision is the model's dtype
    assert (back / SINGLE).read_bytes() == (original / SINGLE).read_bytes()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (original / name).read_bytes(), name
    probe = certificate_of(back)["probe"]
    assert probe["largest_logit_difference"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "there"]


def test_a_dense_model_and_one_without_a_tokenizer(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", DENSE, random_weights(DENSE, 1), tensor=1)
    config = Config(
        model=DENSE, data=DataConfig(document_attention=True), tokenizer=TokenizerConfig(end_of_text_id=5)
    )
    (checkpoint / CONFIG).write_text(yaml.safe_dump(config_to_tree(config)))
    (checkpoint / TOKENIZER).unlink()
    renew_manifest(checkpoint)
    list(convert(checkpoint, tmp_path / "m"))
    list(to_checkpoint(tmp_path / "m", tmp_path / "there", 2))
    read = load_config(tmp_path / "there" / CONFIG)
    assert (read.model, read.data.document_attention, read.tokenizer.end_of_text_id) == (DENSE, True, 5)
    assert not (tmp_path / "there" / TOKENIZER).exists() and not list(find_damage(tmp_path / "there"))
    list(convert(tmp_path / "there", tmp_path / "back"))
    assert (tmp_path / "back" / SINGLE).read_bytes() == (tmp_path / "m" / SINGLE).read_bytes()
    assert (tmp_path / "back" / "config.json").read_bytes() == (tmp_path / "m" / "config.json").read_bytes()


def test_training_goes_on_from_a_published_model(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    first = small_config(tmp_path / "first", text)
    train(first, "training.steps=3", "training.validation_interval=3")
    list(convert(tmp_path / "first", tmp_path / "model"))
    list(to_checkpoint(tmp_path / "model", tmp_path / "start", 2))
    second = small_config(tmp_path / "second", text)
    train(
        second,
        f"checkpoint.resume={tmp_path / 'start'}",
        "training.steps=2",
        "training.validation_interval=1",
    )
    metrics = read_metrics(tmp_path / "second")
    assert [record["step"] for record in metrics] == [1, 2]
    # it begins where the model stood: a fresh one has a loss near log(4096) = 8.3
    before, after = read_metrics(tmp_path / "first")[-1], metrics[0]
    assert before["validation_loss"] < 8.0
    assert after["validation_loss"] < before["validation_loss"] + 0.1


def test_what_exists_is_left_alone(models: Models, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(UserError, match="there: exists already"):
        list(to_checkpoint(models("float32"), tmp_path / "there", 1))
    assert list((tmp_path / "there").iterdir()) == [tmp_path / "there" / "file"]


@pytest.mark.parametrize(
    ("dtype", "tensor", "message"),
    [
        *(("float32", tensor, f"--tensor is {tensor}: choose 1, 2, 4 or 8") for tensor in (0, -1, 3, 16)),
        ("float32", 8, "--tensor 8 does not divide model.num_heads 4"),
        ("int8", 1, "int8: its weights are int8: give a model in float32 or bfloat16"),
    ],
)
def test_what_nothing_can_train_with(
    models: Models, dtype: str, tensor: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        list(to_checkpoint(models(dtype), tmp_path / "there", tensor))
    assert not list(tmp_path.iterdir())


def flip_a_bit(model: Path) -> str:
    with (model / SINGLE).open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    return rf"{SINGLE}: tensor model\.\S+ is not what certificate\.json says"


def truncate(model: Path) -> str:
    os.truncate(model / SINGLE, 100_000)
    return f"{SINGLE}: damaged"


def another_tokenizer(model: Path) -> str:
    tree = json.loads((model / "tokenizer.json").read_text())
    tree["model"]["merges"].reverse()
    (model / "tokenizer.json").write_text(json.dumps(tree))
    return r"tokenizer\.json: is not what tokenizer\.model gives"


def another_size(model: Path) -> str:
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(tree | {"vocab_size": 4100}))
    return r"float32 \(4096, 32\).*config\.json asks for.*\(4100, 32\)"


def garble_the_certificate(model: Path) -> str:
    (model / "certificate.json").write_text("{")
    return r"certificate\.json: damaged"


def lose_the_weights(model: Path) -> str:
    (model / SINGLE).unlink()
    return f"{SINGLE}: missing"


DAMAGE = [
    flip_a_bit,
    truncate,
    another_tokenizer,
    another_size,
    garble_the_certificate,
    lose_the_weights,
]


def test_a_tokenizer_that_transformers_saved(model: Path, tmp_path: Path) -> None:
    """It writes how the last batch was padded and cut, and a template that adds nothing."""
    from transformers import AutoTokenizer

    before = json.loads((model / "tokenizer.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=True)
    tokenizer(["one", "one and two"], padding=True, truncation=True, max_length=8)
    tokenizer.save_pretrained(model)
    found = json.loads((model / "tokenizer.json").read_text())
    assert found["padding"] and found["truncation"] and found != before
    list(to_checkpoint(model, tmp_path / "there", 1))
    template = {
        "type": "TemplateProcessing",
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(found | {"post_processor": template}))
    with pytest.raises(UserError, match="is not what"):
        list(to_checkpoint(model, tmp_path / "other", 1))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_written(
    model: Path, damage: Callable[[Path], str], tmp_path: Path
) -> None:
    expected = damage(model)
    with pytest.raises(UserError, match=expected):
        list(to_checkpoint(model, tmp_path / "there", 2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_was_changed_on_purpose(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / SINGLE)
    tensors["model.head.weight"] += 1
    save_file(tensors, model / SINGLE, {"format": "pt"})
    with pytest.raises(UserError, match=r"delete certificate\.json if the weights were changed on purpose"):
        list(to_checkpoint(model, tmp_path / "there", 1))
    (model / "certificate.json").unlink()
    list(to_checkpoint(model, tmp_path / "there", 1))
    assert torch.equal(CheckpointReader(tmp_path / "there").read("head.weight"), tensors["model.head.weight"])
