"""What conversion writes, that it is what was trained, and that a failure leaves nothing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mf_train.checkpoint.layout import PROBE
from mf_train.checkpoint.read import CheckpointReader
from mf_train.checkpoint.safetensors_file import TensorFile
from mf_train.config import ModelConfig
from mf_train.errors import TrainingError, UserError
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.conversion.weights import row_major_regions
from mf_train.standalone.exported.names import PARAMETER_PREFIX
from mf_train.standalone.folder import CERTIFICATE, SINGLE
from mf_train.standalone.use.load import load_model
from tests.examples import examples
from tests.model.reference import logits_of
from tests.processes import run_python
from tests.standalone.checkpoints import certificate_of, random_weights, renew_manifest, write_checkpoint
from tests.standalone.conftest import Trained
from tests.training.runs import read_metrics

SMALL = ModelConfig(
    hidden_size=32, num_layers=1, num_heads=4, bits=2, vocab_size=4096, sequence_length=24, temperature=1.5
)


def stored(path: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor of a safetensors file, read by hand."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            data[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def stored_values(path: Path) -> dict[str, Tensor]:
    """Weights by their names in the plain model."""
    return {name.removeprefix(PARAMETER_PREFIX): value for name, value in load_file(path).items()}


@pytest.mark.parametrize("which", ["float32_two", "float32_one", "bfloat16_two"])
def test_the_certificate_holds(which: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(which)
    certificate = certificate_of(trained.model)
    dtype = which.split("_")[0]
    assert certificate["format"] == 2 and certificate["dtype"] == dtype
    assert certificate["torch"] == torch.__version__
    known = ("loss", "validation_loss", "validation")
    metrics = {name: read_metrics(trained.run)[-1][name] for name in known}
    assert certificate["source"] == {
        "metrics": metrics | {"validation_step": 3},
        "checkpoint": "step-000000003",
        "step": 3,
        "tokens": 3 * 8 * 32,
        "precision": dtype,
        "device": "cpu",
        "tensor_parallel": 1 if which == "float32_one" else 2,
    }
    tensors = stored(trained.model / SINGLE)
    assert {kind for kind, _ in tensors.values()} == {"F32" if dtype == "float32" else "BF16"}
    assert certificate["tensors"] == {
        name: hashlib.sha256(data).hexdigest() for name, (_, data) in tensors.items()
    }
    others = {path.name: path for path in trained.model.iterdir()}
    others.pop(SINGLE)
    others.pop(CERTIFICATE)
    assert certificate["files"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in others.items()
    }
    assert {"tokenizer.json", "tokenizer.model", "config.json", "README.md", "norm.py"} <= others.keys()
    recorded = load_file(trained.checkpoint / PROBE)
    assert certificate["probe"]["tokens"] == recorded["tokens"].tolist()
    assert certificate["probe"]["text"] == "validation"
    hashes = {name.removeprefix("codes.") for name in recorded if name.startswith("codes.")}
    assert certificate["probe"]["changed_codes"] == dict.fromkeys(hashes, 0.0)
    assert certificate["replay"]["exact"] == (dtype == "float32")
    assert certificate["replay"]["changed_codes"] == dict.fromkeys(hashes, 0.0)
    assert certificate["copy"] == {"equal_logits": 32 * 4160, "equal_codes": 1536}
    assert certificate["rounding"].keys() < certificate["probe"].keys()
    for model in ("", "recorded_"):
        perplexity = math.exp(certificate["probe"][f"{model}loss"])
        assert certificate["probe"][f"{model}perplexity"] == pytest.approx(perplexity)
    losses = [certificate["probe"][key] for key in ("loss", "recorded_loss", "loss_difference", "divergence")]
    assert losses[0] - losses[1] == losses[2] and 7.5 < losses[1] < 8.33  # ln 4160
    if dtype == "float32":
        assert certificate["probe"]["largest_logit_difference"] <= 1e-5
        assert abs(losses[2]) <= 1e-5 and abs(losses[3]) <= 1e-9
    else:  # the head's sums may be rounded to bfloat16 differently
        assert certificate["probe"]["largest_logit_difference"] <= 0.02
        assert abs(losses[2]) <= 0.01 and abs(losses[3]) <= 1e-4


@pytest.mark.parametrize("which", ["float32_two", "bfloat16_two"])
def test_the_weights_are_the_checkpoints(which: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(which)
    reader = CheckpointReader(trained.checkpoint)
    weights = load_file(trained.model / SINGLE)
    assert {name.removeprefix(PARAMETER_PREFIX) for name in weights} == reader.shapes.keys()
    for name, value in weights.items():
        assert torch.equal(value, reader.read(name.removeprefix(PARAMETER_PREFIX)).to(value.dtype)), name


def test_the_logits_are_those_of_a_float64_reference(float32_two: Trained) -> None:
    """Written from the paper, it reads the safetensors file and shares no code with the model."""
    recorded = load_file(float32_two.checkpoint / PROBE)
    weights = {name: value.double() for name, value in stored_values(float32_two.model / SINGLE).items()}
    logits = logits_of(weights, load_model(float32_two.model).config, recorded["tokens"][None])[0]
    torch.testing.assert_close(logits.float(), recorded["logits"], rtol=1e-4, atol=1e-4)


def test_another_dtype_is_reported_and_not_hidden(bfloat16_two: Trained, tmp_path: Path) -> None:
    said = list(convert(bfloat16_two.run, tmp_path / "model", "float32"))
    probe = certificate_of(tmp_path / "model")["probe"]
    recorded = load_file(bfloat16_two.checkpoint / PROBE)
    weights = {name: value.double() for name, value in stored_values(tmp_path / "model" / SINGLE).items()}
    logits = logits_of(weights, load_model(tmp_path / "model").config, recorded["tokens"][None])[0]
    difference = (logits.float() - recorded["logits"]).abs().max().item()
    assert probe["largest_logit_difference"] == pytest.approx(difference, rel=1e-3)
    assert difference > 1e-4
    shares = probe["changed_codes"]
    assert shares["blocks.0.hash_attention"] < max(shares.values()) < 1
    codes = sum(value.numel() for name, value in recorded.items() if name.startswith("codes."))
    changed = sum(round(share * recorded[f"codes.{name}"].numel()) for name, share in shares.items())
    assert changed > 0 and f"{changed} of {codes} codes changed" in said[2]


def test_one_and_two_processes_train_and_convert_alike(float32_one: Trained, float32_two: Trained) -> None:
    one, two = (stored_values(trained.model / SINGLE) for trained in (float32_one, float32_two))
    distance = sum((one[name] - two[name]).square().sum() for name in one)
    assert (
        distance.sqrt() <= 1e-4 * torch.stack([value.square().sum() for value in two.values()]).sum().sqrt()
    )
    losses = [read_metrics(trained.run)[-1]["validation_loss"] for trained in (float32_one, float32_two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_degree_converts_to_the_same_bytes(dtype: str, tmp_path: Path) -> None:
    weights = random_weights(SMALL, seed=0)
    for tensor in (1, 2, 4):
        checkpoint = write_checkpoint(tmp_path / f"{tensor}", SMALL, weights, tensor)
        list(convert(checkpoint, tmp_path / f"model-{tensor}", dtype))
    first, *others = (
        {path.name: path.read_bytes() for path in (tmp_path / f"model-{tensor}").iterdir()}
        for tensor in (1, 2, 4)
    )
    for other in others:
        assert {name for name in first if first[name] != other[name]} == {CERTIFICATE}
    for name, value in stored_values(tmp_path / "model-4" / SINGLE).items():
        assert torch.equal(value, weights[name].to(getattr(torch, dtype)))


def test_what_it_says(float32_two: Trained) -> None:
    read, wrote, certificate, proposal = float32_two.said
    assert str(float32_two.checkpoint) in read and "step 3" in read and "tensor-parallel 2" in read
    assert re.search(r"wrote .*: 36 tensors in float32, \d+\.\d MB in all, \d+\.\d s", wrote), wrote
    assert re.search(
        r"on 32 tokens of validation text the largest logit .* and 0 of 1536 codes", certificate
    ), certificate
    assert proposal.startswith(f"try: memoryformer generate {float32_two.model} ")


def test_it_needs_no_training_package(float32_two: Trained, tmp_path: Path) -> None:
    """Nor transformers, nor a process group; --dtype reaches it."""
    code = """
import sys
from mf_train.cli import main
try:
    main(sys.argv[1:])
except SystemExit as ended:
    assert ended.code == 0, ended.code
import torch
present = {name.split(".")[0] for name in sys.modules}
assert not present & {"deepspeed", "megatron", "datasets", "transformers"}, present
assert not torch.distributed.is_initialized()
"""
    (tmp_path / "empty").mkdir()  # an empty folder is taken
    said = run_python(code, "convert", float32_two.run, tmp_path / "empty", "--dtype", "bfloat16")
    assert len(said.splitlines()) == 6 and "in bfloat16" in said
    assert {kind for kind, _ in stored(tmp_path / "empty" / SINGLE).values()} == {"BF16"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-000000007", SMALL, random_weights(SMALL, seed=1), tensor=2)


def test_a_folder_that_is_there_is_filled_from_inside(checkpoint: Path, tmp_path: Path) -> None:
    """A link, or a mount point, cannot be replaced, and what is beside it is on another disk; killed, nothing loads."""
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    beside = sorted(tmp_path.iterdir())
    code = """
import os, sys
from pathlib import Path
from mf_train.standalone.conversion.convert import new_folder
moved = os.rename
def rename(old, new):
    moved(old, new)
    os._exit(9)
os.rename = rename
with new_folder(Path(sys.argv[1]), last="config.json") as folder:
    assert folder.parent == Path(sys.argv[1])
    (folder / "config.json").write_text("{}")
    if sys.argv[2] == "early":
        os._exit(9)
    (folder / "z").touch()
"""
    for moment in ("early", "moving"):
        assert subprocess.run([sys.executable, "-c", code, link, moment]).returncode == 9
        assert not (real / "config.json").exists() and sorted(tmp_path.iterdir()) == beside
        (real / "z").unlink(missing_ok=True)
    list(convert(checkpoint, link))  # what the first left does not stand in the way
    load_model(link)
    assert sorted(tmp_path.iterdir()) == beside and link.is_symlink() and os.listdir(real.parent) == ["real"]
    assert not (real / ".partial").exists()


def refused(
    checkpoint: Path, output: Path, error: type[Exception] = UserError, dtype: str | None = None
) -> str:
    """The one-line message of a conversion that must fail, which must leave nothing."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error) as caught:
        list(convert(checkpoint, output, dtype))
    assert sorted(output.parent.iterdir()) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").touch()
    assert refused(checkpoint, tmp_path / "full").startswith(f"{tmp_path / 'full'}: exists already; choose")
    assert "exists already" in refused(checkpoint, tmp_path / "full" / "thing")
    assert "nowhere: no such checkpoint" in refused(tmp_path / "nowhere", tmp_path / "out")
    assert "full: holds no complete checkpoint" in refused(tmp_path / "full", tmp_path / "out")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("weights-1-of-2-part-000.safetensors", "cut", "bytes instead of"),
        ("weights-0-of-2-part-000.safetensors", "remove", "missing from the checkpoint"),
        ("weights-0-of-2-part-000.safetensors", "header", "damaged"),
        ("probe.safetensors", "header", "damaged"),
        ("probe.safetensors", "bit", "damaged (its checksum differs"),
        ("config.yaml", "other-model", "damaged (its checksum differs"),
        ("config.yaml", "other-model, recorded", "damaged: blocks.1"),
        ("tokenizer.model", "header", "damaged (its checksum differs"),
        ("tokenizer.model", "header, recorded", "is not a sentencepiece model"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    file: str, damage: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    path = checkpoint / file
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-5])
    elif damage == "remove":
        path.unlink()
    elif damage == "bit":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage.startswith("header"):
        path.write_bytes(b"\xff" * 16 + data[16:])
    else:
        path.write_bytes(data.replace(b"num_layers: 1", b"num_layers: 2"))
    if damage.endswith("recorded"):
        renew_manifest(checkpoint)
    said = refused(checkpoint, tmp_path / "out")
    assert message in said and checkpoint.name in said


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_model_that_is_not_the_trained_one_is_not_written(
    dtype: str, recorded: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """One flipped bit, in the exponent of a head's weight, written so or on the disk since."""
    path = checkpoint / "weights-1-of-2-part-000.safetensors"
    whole = bytearray(path.read_bytes())
    whole[TensorFile(path).tensors["head.weight"].offset + 4 * 5 + 3] ^= 0x02
    path.write_bytes(whole)
    if not recorded:
        assert "damaged (its checksum differs" in refused(checkpoint, tmp_path / "out", UserError, dtype)
        return
    renew_manifest(checkpoint)
    said = refused(checkpoint, tmp_path / "out", TrainingError, dtype)
    assert re.search(
        r"logits differ from the trainer's by [\d.e+]+ \(allowed: [\d.e-]+\) and \d+ of", said
    ), said


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_full_disk_leaves_nothing(dtype: str, checkpoint: Path, tmp_path: Path) -> None:
    code = """
import resource, sys
from mf_train.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
main(sys.argv[1:])
"""
    said = run_python(code, "convert", checkpoint, tmp_path / "out", "--dtype", dtype, status=1)
    (line,) = said.splitlines()
    assert line.startswith("memoryformer: ") and "large" in line
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_what_a_killed_conversion_left_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").touch()
    list(convert(checkpoint, tmp_path / "deep" / "out"))
    list(convert(checkpoint, tmp_path / "out"))
    assert not (tmp_path / "out" / "old").exists() and not (tmp_path / ".out.partial").exists()
    assert load_model(tmp_path / "deep" / "out").config == load_model(tmp_path / "out").config == SMALL
    shutil.rmtree(tmp_path / "out")


@examples(200)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.integers(1, 60))
def test_regions_cover_a_tensor_in_order(shape: list[int], limit: int) -> None:
    values = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [values[region] for region in row_major_regions(tuple(shape), limit)]
    assert torch.equal(torch.cat([part.reshape(-1) for part in parts]), values.view(-1))
    assert all(part.numel() <= limit and part.is_contiguous() for part in parts)
    largest_row = torch.Size(shape[1:]).numel()
    if largest_row <= limit:
        assert len(parts) == -(-shape[0] // (limit // largest_row))


def test_the_model_card_says_what_was_trained(float32_two: Trained, bfloat16_two: Trained) -> None:
    for trained, precision in ((float32_two, "float32"), (bfloat16_two, "bfloat16")):
        card = (trained.model / "README.md").read_text()
        last = read_metrics(trained.run)[-1]
        for words in (
            "| steps | 3 of 3 |",
            "| tokens | 768 |",
            "| batch | 8 sequences of 32 tokens |",
            f"| precision | {precision} |",
            f"| loss of the last step | {last['loss']:.4f} nats a token |",
            f"| validation loss | {last['validation_loss']:.4f} nats a token, after step 3 |",
            "Trained on:\n\n- `text.jsonl`, weight 1",
            "Validated on:\n\n- `text.jsonl`, weight 1",
            "| tokens compared | 32, of the run's validation text |",
            "| vocab_size | 4160 |",
            "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        ):
            assert words in card, words
        assert ("equal codes, logits within" in card) == (precision == "float32")
        assert not any(str(trained.run.parent) in text for text in _texts(trained.model))  # a private path


def _texts(model: Path) -> list[str]:
    return [path.read_text() for path in model.iterdir() if path.suffix in (".json", ".md", ".py")]


def test_a_card_leaves_out_what_a_run_has_not(checkpoint: Path, tmp_path: Path) -> None:
    list(convert(checkpoint, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "drawn at random" in card and "## Training" in card
    assert not re.search("validation loss|Validated on|Trained on|None", card)


def test_the_settings_are_those_of_transformers(float32_two: Trained) -> None:
    settings = json.loads((float32_two.model / "generation_config.json").read_text())
    config = json.loads((float32_two.model / "config.json").read_text())
    ids = {config[f"{name}_token_id"] for name in ("bos", "eos", "pad")}
    assert len(ids) == 1 and settings == {f"{name}_token_id": min(ids) for name in ("bos", "eos", "pad")}
    assert config["dtype"] == "float32" and config["model_type"] == "memoryformer"
