"""A model whose weights stay in files computes what the loaded model does, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import Config, ModelConfig
from mf_train.errors import UserError
from mf_train.model.memory import record_codes
from mf_train.standalone.conversion import streamed_model as module
from mf_train.standalone.conversion.settings_files import settings_files
from mf_train.standalone.conversion.streamed_model import (
    CheckpointWeights,
    FolderWeights,
    Results,
    compute,
    streamed_model,
)
from mf_train.standalone.conversion.weights import copy_weights
from mf_train.standalone.folder import INDEX, SINGLE, open_tensors
from mf_train.standalone.use.load import load_model
from tests.examples import examples
from tests.standalone.checkpoints import random_weights, write_checkpoint, write_tensors

TOKENS = torch.randint(4096, (40,), generator=torch.Generator().manual_seed(3))


KINDS: dict[str, Any] = {
    "memoryformer": {},
    "dense": {"kind": "dense"},
    "product keys": {"ffn": "product_key", "product_keys": 30, "product_query": 8, "product_reads": 3},
    "hybrid": {"ffn": "low_rank", "output": "memory", "rank": 4, "residual_rank": 4, "rotation": True},
}


def config_of(kind: str, vocab_size: int = 4096) -> ModelConfig:
    return ModelConfig(
        **KINDS[kind],
        hidden_size=48,
        num_layers=2,
        num_heads=4,
        bits=3,
        vocab_size=vocab_size,
        sequence_length=64,
        temperature=1.5,
        norm="rmsnorm",
    )


def write_model(reader: CheckpointReader, config: ModelConfig, dtype: str, folder: Path) -> Path:
    """A standalone folder in several weight files, without what a forward pass does not read."""
    folder.mkdir()
    for name, content in settings_files(Config(model=config), dtype, 0).items():
        (folder / name).write_bytes(content)
    copy_weights(reader, folder, getattr(torch, dtype), shard_bytes=200_000)
    assert (folder / INDEX).is_file()
    return folder


def loaded(folder: Path, tokens: Tensor) -> Results:
    model = load_model(folder)
    with torch.no_grad(), record_codes(model) as codes:
        logits = model(tokens[None])[0].float()
    return Results(tokens, logits, {name: value[0] for name, value in codes.items()})


def same(a: Results, b: Results) -> bool:
    assert a.codes.keys() == b.codes.keys()
    return torch.equal(a.logits, b.logits) and all(torch.equal(a.codes[k], b.codes[k]) for k in a.codes)


@pytest.fixture(scope="module", params=KINDS)
def readers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelConfig, list[CheckpointReader]]:
    """The same weights written by 1, 2 and 4 tensor-parallel ranks."""
    config = config_of(request.param)
    weights, folder = random_weights(config, seed=2), tmp_path_factory.mktemp("checkpoints")
    return config, [
        CheckpointReader(write_checkpoint(folder / f"{tensor}", config, weights, tensor))
        for tensor in (1, 2, 4)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_source_gives_the_loaded_models_bits(
    dtype: str, readers: tuple[ModelConfig, list[CheckpointReader]], tmp_path: Path
) -> None:
    config, found = readers
    folder = write_model(found[1], config, dtype, tmp_path / "model")
    expected = loaded(folder, TOKENS)
    hashes = [config.qkv_kind, config.output_kind, config.ffn_kind, config.ffn_kind].count("memory")
    assert len(expected.codes) == hashes * config.num_layers
    assert expected.logits.isfinite().all() and expected.logits.std() > 0.1
    weights = FolderWeights(folder)
    assert weights.config == config
    assert same(compute(streamed_model(config, weights), TOKENS), expected)
    for reader in found:
        assert same(compute(streamed_model(config, CheckpointWeights(reader, dtype)), TOKENS), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_reads_in_small_pieces_change_nothing(
    dtype: str, readers: tuple[ModelConfig, list[CheckpointReader]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a lookup's tokens, and of the rows that are read at a time."""
    config, found = readers
    weights = CheckpointWeights(found[1], dtype)
    expected = compute(streamed_model(config, weights), TOKENS)
    monkeypatch.setattr(module, "READ_BYTES", 1000)
    assert same(compute(streamed_model(config, weights), TOKENS), expected)
    monkeypatch.setattr(module, "TABLE_BYTES", 30_000)
    small = compute(streamed_model(config, weights), TOKENS)
    assert all(torch.equal(small.codes[name], expected.codes[name]) for name in expected.codes)
    # the head is cut too, and a product of another size may sum in another order
    torch.testing.assert_close(small.logits, expected.logits, rtol=2e-2, atol=2e-2)


def test_a_vocabulary_that_is_not_cut_and_a_scaled_score(tmp_path: Path) -> None:
    config = ModelConfig(
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        bits=4,
        vocab_size=4099,
        sequence_length=64,
        score="scaled_probability",
        ffn_activation="gelu",
        ffn_inner_norm="rmsnorm",
    )
    reader = CheckpointReader(write_checkpoint(tmp_path / "a", config, random_weights(config, 4), 1))
    folder = write_model(reader, config, "float32", tmp_path / "model")
    assert same(
        compute(streamed_model(config, CheckpointWeights(reader, "float32")), TOKENS), loaded(folder, TOKENS)
    )


def test_only_small_parameters_are_held(readers: tuple[ModelConfig, list[CheckpointReader]]) -> None:
    config, found = readers
    state = streamed_model(config, CheckpointWeights(found[0], "bfloat16")).state_dict()
    assert state and all(value.dtype == torch.bfloat16 for value in state.values())
    small = {
        name
        for name, shape in found[0].shapes.items()
        if len(shape) == 1 or name.endswith((".keys", ".skew"))
    }
    assert set(state) == small


def test_forced_codes_are_handed_on_and_computed_ones_recorded(
    readers: tuple[ModelConfig, list[CheckpointReader]],
) -> None:
    config, found = readers
    if config.ffn_kind != "memory":
        pytest.skip("its FFN has no codes")
    model = streamed_model(config, CheckpointWeights(found[0], "float32"))
    free = compute(model, TOKENS)
    assert same(compute(model, TOKENS, free.codes), free)
    other = {name: value.clone() for name, value in free.codes.items()}
    other["blocks.0.hash_ffn"][5, 3] ^= 1
    forced = compute(model, TOKENS, other)
    for name in ("blocks.0.hash_attention", "blocks.0.hash_ffn"):  # nothing before it changes
        assert torch.equal(forced.codes[name], free.codes[name])
    inner = "blocks.0.hash_inner"
    assert (forced.codes[inner][5] != free.codes[inner][5]).any()
    assert torch.equal(forced.codes[inner][:5], free.codes[inner][:5])  # of other tokens neither
    assert not torch.equal(forced.logits[5], free.logits[5])
    assert same(compute(model, TOKENS), free)  # no hook stays behind


@examples(100)
@given(st.sets(st.integers(0, 60), min_size=1))
def test_rows_are_read_with_or_without_those_between(rows: set[int]) -> None:
    table, read = torch.arange(61.0)[:, None] * torch.ones(3), []

    def read_rows(name: str, indices: Tensor) -> Tensor:
        read.append(len(indices))
        return table[indices]

    indices = torch.tensor(sorted(rows))
    assert torch.equal(module._read_dense(read_rows, "", indices), table[indices])
    assert len(read) == 1 and read[0] <= module._SPARSE * len(rows)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("index", "model.safetensors.index.json: damaged; convert"),
        ("elsewhere", "index.json: damaged ('../secret.safetensors' is not a file's name)"),
        ("gone", "model-00002-of-"),
        ("lost", "tensor model.embedding.weight is missing, and config.json asks for float32"),
        ("pickle", "not a safetensors file"),
        ("place", "tensor model.final_norm.weight is not where it says"),
    ],
)
def test_damaged_folders_are_named(
    damage: str, message: str, readers: tuple[ModelConfig, list[CheckpointReader]], tmp_path: Path
) -> None:
    config, found = readers
    folder = write_model(found[0], config, "float32", tmp_path / "model")
    if damage in ("index", "elsewhere", "gone", "place"):
        index = json.loads((folder / INDEX).read_text())
        if damage == "elsewhere":
            index["weight_map"]["model.embedding.weight"] = "../secret.safetensors"
        elif damage == "place":
            name = "model.final_norm.weight"  # which is not alone in its file
            others = set(index["weight_map"].values()) - {index["weight_map"][name]}
            index["weight_map"][name] = min(others)
        elif damage == "gone":
            next(folder.glob("model-00002-of-*")).unlink()
        (folder / INDEX).write_text("[]" if damage == "index" else json.dumps(index))
    else:
        tensors = {name: file.read(name) for name, file in open_tensors(folder).items()}
        for path in folder.glob("model*"):
            path.unlink()
        if damage == "lost":
            del tensors["model.embedding.weight"]
        write_tensors(folder / SINGLE, tensors)
        if damage == "pickle":
            torch.save(tensors, folder / SINGLE)
    with pytest.raises(UserError) as caught:
        FolderWeights(folder)
    assert message in str(caught.value) and "convert the checkpoint again" in str(caught.value)
    shutil.rmtree(folder)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_model_without_a_head_is_for_transformers(
    tied: bool, readers: tuple[ModelConfig, list[CheckpointReader]], tmp_path: Path
) -> None:
    config, found = readers
    folder = write_model(found[0], config, "float32", tmp_path / "model")
    tensors = {name: file.read(name) for name, file in open_tensors(folder).items()}
    for path in folder.glob("model*"):
        path.unlink()
    del tensors["model.head.weight"]
    write_tensors(folder / SINGLE, tensors)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"tie_word_embeddings": tied}))
    for read in (FolderWeights, load_model):
        with pytest.raises(UserError) as caught:
            read(folder)
        assert ("use the model with transformers" in str(caught.value)) == tied
        assert ("convert the checkpoint again" in str(caught.value)) != tied
    shutil.rmtree(folder)
