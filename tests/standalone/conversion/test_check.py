"""A damaged conversion is found: by each line of defence alone, and by `convert` before it is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from mf_train.checkpoint.layout import CONFIG, MANIFEST, PROBE, TOKENIZER, FileRecord, read_manifest
from mf_train.checkpoint.probe import probe_tensors, random_tokens
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFileWriter
from mf_train.config import ModelConfig
from mf_train.errors import TrainingError, UserError
from mf_train.standalone.conversion import check, weights
from mf_train.standalone.conversion.certificate import hash_files
from mf_train.standalone.conversion.check import (
    BY_CERTIFICATE,
    check_conversion,
    differing,
    differing_figures,
    differing_from_checkpoint,
)
from mf_train.standalone.conversion.convert import convert, open_checkpoint
from mf_train.standalone.conversion.proof import prove
from mf_train.standalone.conversion.streamed_model import (
    CheckpointWeights,
    FolderWeights,
    compute,
    streamed_model,
)
from mf_train.standalone.conversion.weights import Stored
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import CERTIFICATE, DTYPES, SINGLE, open_tensors
from mf_train.standalone.use.load import load_model
from tests.standalone.checkpoints import (
    certificate_of,
    random_weights,
    renew_manifest,
    write_checkpoint,
    write_tensors,
)

SMALL = ModelConfig(
    hidden_size=32, num_layers=2, num_heads=4, bits=2, vocab_size=4096, sequence_length=24, temperature=1.5
)
BLOCK = f"{PARAMETER_PREFIX}blocks.1."
Tensors = dict[str, Tensor]
Damage = Callable[[Tensors], None]


def swap_tables(tensors: Tensors) -> None:
    """Two of the K tables of a layer."""
    for kind in ("tables", "scales"):
        if (name := f"{BLOCK}query.{kind}") in tensors:
            tensors[name][[2, 5]] = tensors[name][[5, 2]]


def swap_query_and_key(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(f"{BLOCK}query.")]:
        other = name.replace("query", "key")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def shift_slice(tensors: Tensors) -> None:
    """A tensor-parallel slice, half of the columns, one column too far."""
    half = tensors[f"{BLOCK}value.tables"][..., 16:]
    half.copy_(half.roll(1, -1))


def reverse_rows(tensors: Tensors) -> None:
    """As a hash whose bits are the other way round would order them."""
    for kind in ("tables", "scales"):
        if (name := f"{BLOCK}down.{kind}") in tensors:
            tensors[name] = tensors[name].flip(1).contiguous()


def lose_norm(tensors: Tensors) -> None:
    tensors[f"{BLOCK}norm_ffn.weight"].fill_(1.0)


def swap_vocabulary(tensors: Tensors) -> None:
    """The two halves of a head that two ranks held, merged in the wrong order."""
    for kind in ("weight", "scales"):
        if (name := f"{PARAMETER_PREFIX}head.{kind}") in tensors:
            tensors[name] = tensors[name].roll(2048, 0)


DAMAGES: list[Damage] = [
    swap_tables,
    swap_query_and_key,
    shift_slice,
    reverse_rows,
    lose_norm,
    swap_vocabulary,
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "step-000000007"
    return write_checkpoint(folder, SMALL, random_weights(SMALL, seed=1), tensor=2)


@pytest.fixture(scope="module")
def bfloat16_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights, trained in bfloat16."""
    folder = tmp_path_factory.mktemp("bfloat16") / checkpoint.name
    shutil.copytree(checkpoint, folder)
    model = streamed_model(SMALL, CheckpointWeights(CheckpointReader(checkpoint), "bfloat16"))
    results = compute(model, random_tokens(SMALL))
    write_tensors(
        folder / PROBE, probe_tensors(results.tokens, results.logits, results.codes, validation=True)
    )
    tree = yaml.safe_load((folder / CONFIG).read_text())
    tree["training"]["precision"] = "bfloat16"
    (folder / CONFIG).write_text(yaml.safe_dump(tree))
    renew_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def good(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound conversion in each dtype."""
    folder = tmp_path_factory.mktemp("models")
    for dtype in DTYPES:
        list(convert(checkpoint, folder / dtype, dtype))
    return {dtype: folder / dtype for dtype in DTYPES}


@pytest.fixture(scope="module")
def converted(checkpoint: Path) -> dict[str, dict[str, str]]:
    """The tensors' hashes that the checkpoint gives in each dtype."""
    reader = CheckpointReader(checkpoint)
    tensors = {dtype: weights.stored_tensors(reader.shapes, getattr(torch, dtype)) for dtype in DTYPES}
    return {dtype: weights.convert_weights(reader, tensors[dtype], lambda *_: None) for dtype in DTYPES}


def damage_tensors(model: Path, damage: Damage) -> set[str]:
    """Rewrites a folder's only weight file; returns the names of the tensors that are others now."""
    files = open_tensors(model)
    (file,) = set(files.values())
    before = {name: file.read(name) for name in sorted(files, key=lambda name: file.tensors[name].offset)}
    tensors = {name: value.clone() for name, value in before.items()}
    damage(tensors)
    layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    with TensorFileWriter(file.path, layout, {"format": "pt"}) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    return {name for name in before if not torch.equal(before[name], tensors[name])}


def repair_certificate(model: Path) -> None:
    """Hashes as they are now, as one who hides the damage would write them."""
    tree = certificate_of(model)
    tree["tensors"] = check.hash_tensors(model)
    tree["files"] = dict(hash_files(model))
    (model / CERTIFICATE).write_text(json.dumps(tree))


def by_hash(model: Path) -> list[str]:
    """First line of defence."""
    tree = certificate_of(model)
    found = check.hash_tensors(model) | dict(hash_files(model))
    return list(differing(found, tree["tensors"] | tree["files"], BY_CERTIFICATE))


def by_conversion(checkpoint: Path, model: Path) -> list[str]:
    """Second line of defence."""
    reader, config = open_checkpoint(checkpoint)
    found = check.hash_tensors(model) | dict(hash_files(model))
    return list(differing_from_checkpoint(reader, config, certificate_of(model), found))


def by_results(checkpoint: Path, model: Path) -> str:
    """Third line of defence: its message, or nothing."""
    reader, config = open_checkpoint(checkpoint)
    try:
        prove(reader, config, "cpu", certificate_of(model)["dtype"], model)
    except TrainingError as error:
        return str(error)
    return ""


def refusal(checkpoint: Path, model: Path) -> str:
    with pytest.raises(TrainingError) as caught:
        list(check_conversion(checkpoint, model))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sound_conversion_passes(dtype: str, checkpoint: Path, good: dict[str, Path]) -> None:
    said = list(check_conversion(checkpoint, good[dtype]))
    assert said[-1] == f"{good[dtype]}: is {checkpoint} in {dtype}"
    assert sum("all as they should be" in line for line in said) == 2
    assert by_hash(good[dtype]) == by_conversion(checkpoint, good[dtype]) == []
    assert by_results(checkpoint, good[dtype]) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_found_by_each_line(
    damage: Damage,
    dtype: str,
    checkpoint: Path,
    good: dict[str, Path],
    converted: dict[str, dict[str, str]],
    tmp_path: Path,
) -> None:
    model = shutil.copytree(good[dtype], tmp_path / "model")
    changed = damage_tensors(model, damage)
    assert changed
    assert by_hash(model) == [f"{name} has another hash than in certificate.json" for name in sorted(changed)]
    repair_certificate(model)
    assert by_hash(model) == []
    found = check.hash_tensors(model)
    assert {name for name, digest in converted[dtype].items() if found[name] != digest} == changed
    assert by_results(checkpoint, model).startswith(f"the written model is not the checkpoint's in {dtype}:")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repaired", [False, True])
def test_damaged_weights_are_refused(
    repaired: bool, dtype: str, checkpoint: Path, good: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(good[dtype], tmp_path / "model")
    (name,) = damage_tensors(model, lose_norm)
    if repaired:
        repair_certificate(model)
    said = refusal(checkpoint, model)
    assert ("has another hash than in certificate.json" in said) == (not repaired)
    assert "the written model is not" in said and f"{name} is not what the checkpoint gives" in said


def change_tokenizer(model: Path) -> str:
    path = model / "tokenizer.json"
    text = path.read_text()
    changed = text.replace('"\\n": ', '"\\r": ', 1) if '"\\n": ' in text else text.replace("the", "thx", 1)
    assert changed != text
    path.write_text(changed)
    return path.name


def change_temperature(model: Path) -> str:
    path = model / "config.json"
    tree = json.loads(path.read_text())
    tree["hash_temperature"] *= 1.01
    path.write_text(json.dumps(tree))
    return path.name


def change_code(model: Path) -> str:
    path = model / "memory.py"
    path.write_text(path.read_text() + "\nimport os\n")
    return path.name


def change_card(model: Path) -> str:
    path = model / "README.md"
    path.write_text(path.read_text().replace("perplexity", "perplexitv"))
    return path.name


@pytest.mark.parametrize("change", [change_tokenizer, change_temperature, change_code, change_card])
def test_changed_files_are_found(
    change: Callable[[Path], str], checkpoint: Path, good: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(good["float32"], tmp_path / "model")
    name = change(model)
    assert by_hash(model) == [f"{name} has another hash than in certificate.json"]
    assert by_hash(model)[0] in refusal(checkpoint, model)
    repair_certificate(model)
    assert by_hash(model) == []
    assert by_conversion(checkpoint, model) == [f"{name} is not what the checkpoint gives"]
    assert f"{name} is not what the checkpoint gives" in refusal(checkpoint, model)
    # only a setting of the model shows in its results
    assert ("logits" in by_results(checkpoint, model)) == (change is change_temperature)


def test_missing_and_added_files_are_found(checkpoint: Path, good: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(good["float32"], tmp_path / "model")
    (model / "tokenizer.model").unlink()
    (model / "extra.py").write_text("")
    (model / "model-00001-of-00002.safetensors").write_bytes((model / SINGLE).read_bytes())
    said = refusal(checkpoint, model)
    assert "tokenizer.model is missing" in said and "extra.py is not in certificate.json" in said
    assert "model-00001-of-00002.safetensors is a file of weights that no index names" in said


def test_what_another_program_may_load_is_found(
    checkpoint: Path, good: dict[str, Path], tmp_path: Path
) -> None:
    """transformers executes custom_generate/generate.py, as a folder or a link to one."""
    model = shutil.copytree(good["float32"], tmp_path / "model")
    (model / ".git").mkdir()
    assert list(check_conversion(checkpoint, model))[-1].endswith("in float32")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "generate.py").write_text("def generate(model): ...")
    for make in (shutil.copytree, lambda source, link: link.symlink_to(source)):
        made = model / "custom_generate"
        make(tmp_path / "elsewhere", made)
        repair_certificate(model)
        assert "custom_generate is not a file, and a converted model has nothing else" in refusal(
            checkpoint, model
        )
        made.unlink() if made.is_symlink() else shutil.rmtree(made)


def test_a_folder_of_another_version_is_told_from_damage(
    checkpoint: Path, good: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(good["float32"], tmp_path / "model")
    change_code(model)
    repair_certificate(model)
    assert "not what was trained" in refusal(checkpoint, model)
    tree = certificate_of(model) | {"memoryformer": "0.0.1"}
    (model / CERTIFICATE).write_text(json.dumps(tree))
    said = refusal(checkpoint, model)
    assert "memoryformer 0.0.1 made it" in said and "memory.py is not what the checkpoint gives" in said
    for change in (change_tokenizer, lambda model: damage_tensors(model, lose_norm)):
        change(model)
        repair_certificate(model)
        assert "not what was trained" in refusal(checkpoint, model)


def test_an_absurd_model_is_not_built(good: dict[str, Path], tmp_path: Path) -> None:
    """Of a thousand million blocks it would never be; of these it is in seconds, and then refused otherwise."""
    model = shutil.copytree(good["float32"], tmp_path / "model")
    tree = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 2000}))
    for use in (FolderWeights, load_model):
        with pytest.raises(
            UserError, match=r"config\.json: damaged \(it asks for 2000 blocks, and the files hold"
        ):
            use(model)


def test_a_lost_tensor_is_found(checkpoint: Path, good: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(good["float32"], tmp_path / "model")
    name = f"{BLOCK}norm_ffn.weight"
    file = open_tensors(model)[name]
    kept = {other: file.read(other) for other in file.tensors if other != name}
    write_tensors(file.path, kept)
    said = refusal(checkpoint, model)
    assert f"{name} is missing" in said and f"tensor {name} is missing, and config.json asks for" in said


@pytest.mark.parametrize("place", ["probe.loss", "probe.tokens", "rounding.changed_codes", "replay.exact"])
def test_invented_figures_are_found(
    place: str, checkpoint: Path, good: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(good["bfloat16"], tmp_path / "model")
    tree = certificate_of(model)
    section, key = place.split(".")
    value = tree[section][key]
    if isinstance(value, dict):
        value = dict.fromkeys(value, 0.9)
    tree[section][key] = {"loss": 5.0, "tokens": [1, 2], "changed_codes": value, "exact": False}[key]
    (model / CERTIFICATE).write_text(json.dumps(tree))
    assert f"certificate.json: {place}" in refusal(checkpoint, model)


@pytest.mark.parametrize(
    ("place", "share"),
    [
        ("rounding.changed_codes", 0.0),
        ("rounding.largest_logit_difference", 0.0),
        ("rounding.largest_logit_difference", 0.4),
        ("rounding.divergence", 0.0),
        ("probe.changed_codes", 0.0),
        ("probe.loss", 0.98),
        ("probe.perplexity", 0.98),
    ],
)
def test_beautified_figures_are_found(
    place: str, share: float, checkpoint: Path, good: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(good["bfloat16"], tmp_path / "model")
    tree = certificate_of(model)
    section, key = place.split(".")
    value = tree[section][key]
    tree[section][key] = dict.fromkeys(value, share) if isinstance(value, dict) else share * value
    (model / CERTIFICATE).write_text(json.dumps(tree))
    assert f"certificate.json: {place}" in refusal(checkpoint, model)


def test_another_processors_figures_are_as_good() -> None:
    def figures(logit: float, share: float, loss: float, divergence: float) -> dict[str, Any]:
        return {
            "rounding": {
                "largest_logit_difference": logit,
                "changed_codes": {"blocks.0.hash_ffn": share},
                "loss": loss,
                "divergence": divergence,
            }
        }

    for one, other in (
        (figures(0.0, 0.0, 4.6, 0.0), figures(8.6e-6, 1e-4, 4.600001, 1e-10)),
        (figures(0.0129, 0.008, 4.61, 5.4e-6), figures(0.011, 0.006, 4.59, 7e-6)),
    ):
        assert list(differing_figures(one, other)) == list(differing_figures(other, one)) == []
    zeros = list(differing_figures(figures(0.0129, 0.008, 4.61, 5.4e-6), figures(0.0, 0.0, 4.5, 0.0)))
    assert len(zeros) == 4


def test_mistakes_are_named(checkpoint: Path, good: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"certificate\.json: missing; give a model that"):
        list(check_conversion(checkpoint, tmp_path))
    (tmp_path / "certificate.json").write_text('{"format": 1, "dtype": "float32"}')
    with pytest.raises(UserError, match=r"certificate\.json: damaged, or of another version"):
        list(check_conversion(checkpoint, tmp_path))
    later = shutil.copytree(checkpoint, tmp_path / "step-000000008")
    tree = json.loads((later / MANIFEST).read_text())
    manifest = read_manifest(later)
    (later / MANIFEST).write_text(
        type(manifest)(**{**vars(manifest), "step": 8, "files": {**manifest.files}}).to_json()
    )
    assert tree["step"] == 7 and isinstance(manifest.files[TOKENIZER], FileRecord)
    with pytest.raises(
        UserError, match=r"made from step-000000007, and .* is of step 8; give the checkpoint"
    ):
        list(check_conversion(later, good["float32"]))


# The converter itself is damaged: what it writes is not to be written.


def refused(checkpoint: Path, output: Path, dtype: str) -> str:
    with pytest.raises(TrainingError) as caught:
        list(convert(checkpoint, output, dtype))
    assert list(output.parent.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_converter_that_writes_other_weights_is_refused(
    damage: Damage, dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mf_train.standalone.conversion import convert as module

    def copy_and_damage(*arguments: Any) -> dict[str, str]:
        digests = weights.copy_weights(*arguments)
        assert damage_tensors(arguments[1], damage)
        return digests

    monkeypatch.setattr(module, "copy_weights", copy_and_damage)
    said = refused(checkpoint, tmp_path / "model", dtype)
    assert said.startswith(f"the written model is not the checkpoint's in {dtype}: ")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_damaged_name_map_is_refused(
    dtype: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = weights.stored_tensors

    def swapped(*arguments: Any) -> dict[str, Stored]:
        found = sound(*arguments)
        for kind in ("tables", "bias", "scales"):
            pair = [f"{BLOCK}{which}.{kind}" for which in ("query", "key")]
            if pair[0] in found:
                found[pair[0]], found[pair[1]] = found[pair[1]], found[pair[0]]
        return found

    monkeypatch.setattr(weights, "stored_tensors", swapped)
    assert "the written model is not the checkpoint's" in refused(checkpoint, tmp_path / "model", dtype)


SWAPPED = {
    f"blocks.1.{a}.{kind}": f"blocks.1.{b}.{kind}"
    for a, b in (("query", "key"), ("key", "query"))
    for kind in ("tables", "bias")
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("damage", ["names", "columns"])
def test_a_reader_that_reads_other_weights_is_refused(
    damage: str,
    precision: str,
    dtype: str,
    checkpoint: Path,
    bfloat16_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then both models have the same wrong weights, and only what the trainer recorded tells."""
    sound_read, sound_rows = CheckpointReader.read, CheckpointReader.rows

    def other(name: str) -> str:
        return SWAPPED.get(name, name) if damage == "names" else name

    def wrong(name: str, values: Tensor) -> Tensor:
        if damage == "columns" and name == "blocks.0.value.tables":
            values.copy_(values.roll(16, -1))  # the two ranks' slices the other way round
        return values

    def read(self: CheckpointReader, name: str, *arguments: Any, **more: Any) -> Tensor:
        return wrong(name, sound_read(self, other(name), *arguments, **more))

    def rows(self: CheckpointReader, name: str, indices: Tensor) -> Tensor:
        return wrong(name, sound_rows(self, other(name), indices))

    monkeypatch.setattr(CheckpointReader, "read", read)
    monkeypatch.setattr(CheckpointReader, "rows", rows)
    trained = checkpoint if precision == "float32" else bfloat16_checkpoint
    said = refused(trained, tmp_path / "model", dtype)
    assert said.startswith("the checkpoint's weights are not the model that was trained: ")


def test_a_sound_bfloat16_run_converts(bfloat16_checkpoint: Path, tmp_path: Path) -> None:
    list(convert(bfloat16_checkpoint, tmp_path / "model"))
    tree = certificate_of(tmp_path / "model")
    assert tree["replay"]["exact"] is False and tree["probe"]["text"] == "validation"
    assert tree["probe"]["largest_logit_difference"] == tree["rounding"]["largest_logit_difference"] == 0
    said = list(check_conversion(bfloat16_checkpoint, tmp_path / "model"))
    assert said[-1].endswith("in bfloat16")
