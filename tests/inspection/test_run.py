"""`memoryformer inspect` on checkpoints, converted models and what is neither."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mf_train.cli import main
from mf_train.config import DataConfig, ModelConfig, SourceConfig
from mf_train.data.stream.validation import validation_tokens
from mf_train.data.tokenizer import Tokenizer
from mf_train.inspection.terminal import sparkline
from mf_train.model import MemoryFormer
from mf_train.model.memory import record_codes
from mf_train.standalone.conversion.convert import convert
from tests.standalone.checkpoints import random_weights, write_checkpoint
from tests.telemetry.test_statistics import expected_numbers
from tests.training.runs import TOKENIZER, write_text

Capture = pytest.CaptureFixture[str]
MODEL = ModelConfig(
    hidden_size=32, num_layers=4, num_heads=2, bits=4, expand_bits=1, vocab_size=4096, sequence_length=48
)
SEQUENCES = 5


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints" / "step-000000007"
    return write_checkpoint(folder, MODEL, random_weights(MODEL, 3), tensor=2)


def inspect(capsys: Capture, *arguments: object, status: int = 0) -> str:
    """What the command prints: its output, or where it fails its complaint."""
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    assert ended.value.code == status, captured.err
    return captured.err if status else captured.out


def test_numbers_are_those_of_the_plain_model(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = checkpoint.parents[1]
    found = json.loads(inspect(capsys, run, "--data", text, "--sequences", SEQUENCES, "--json"))
    model = MemoryFormer(MODEL)
    model.load_state_dict(random_weights(MODEL, 3))
    sources = [SourceConfig(path=str(text))]
    ids = validation_tokens(sources, DataConfig(), Tokenizer(TOKENIZER), 48, SEQUENCES)
    rows = torch.from_numpy(ids[:-1]).long().view(SEQUENCES, 48)
    with record_codes(model) as codes:
        model(rows)
    assert found["tokens"] == rows.numel() and found["tables"].keys() == codes.keys()
    assert found["model"] == str(checkpoint)
    for name, values in codes.items():
        tau = 5 if name.endswith("inner") else 4
        each = [expected_numbers(table.tolist(), tau) for table in values.flatten(0, 1).T]
        for place, key in enumerate(("rows_read", "entropy", "gini", "largest_share"), 1):
            assert found["tables"][name]["each_table"][key] == pytest.approx([one[place] for one in each])
    output = tmp_path / "model"
    list(convert(checkpoint, output))
    converted = json.loads(inspect(capsys, output, "--data", text, "--sequences", SEQUENCES, "--json"))
    assert converted["tables"] == found["tables"]


def test_terminal_and_files(checkpoint: Path, text: Path, tmp_path: Path, capsys: Capture) -> None:
    before = sorted(checkpoint.parents[1].rglob("*"))
    said = inspect(capsys, checkpoint, "--data", text, "--output", tmp_path / "new" / "folder")
    assert sorted(checkpoint.parents[1].rglob("*")) == before
    lines = said.splitlines()
    assert lines[0].startswith(f"{checkpoint}: 1,056 tokens in 22 sequences")  # 32 for each of 32 rows
    assert [line[:17].strip() for line in lines[2:14]] == [
        f"layer {layer} {name}" for layer in range(4) for name in ("qkv", "ffn_up", "ffn_down")
    ]
    folder = tmp_path / "new" / "folder"
    assert sorted(path.name for path in folder.iterdir()) == ["buckets.png", "tables.json"]
    assert (folder / "buckets.png").read_bytes().startswith(b"\x89PNG")
    tree = json.loads((folder / "tables.json").read_text())
    assert len(tree["tables"]) == 12 and tree["sequences"] == 22


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{folder}/nothing"], "no such folder; give a run's folder, a checkpoint or a converted model"),
        (["{folder}"], "holds no complete checkpoint"),
        (["{checkpoint}"], "its run had no data.validation: add --data GLOB"),
        (["{checkpoint}", "--data", "{folder}/*.jsonl"], "--data[0]"),
        (["{checkpoint}", "--data", "{text}", "--sequences", "0"], "--sequences is 0"),
        (["{checkpoint}", "--data", "{text}", "--output", "{text}"], "not a folder"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], complaint: str, checkpoint: Path, text: Path, tmp_path: Path, capsys: Capture
) -> None:
    given = [word.format(folder=tmp_path, checkpoint=checkpoint, text=text) for word in arguments]
    said = inspect(capsys, *given, status=2)
    assert complaint in said and len(said.splitlines()) == 1


def test_damage_and_dense_models_are_named(text: Path, tmp_path: Path, capsys: Capture) -> None:
    damaged = write_checkpoint(tmp_path / "damaged", MODEL, random_weights(MODEL, 3), tensor=1)
    weights = next(damaged.glob("weights-*"))
    weights.write_bytes(weights.read_bytes()[:-100])
    said = inspect(capsys, damaged, "--data", text, status=2)
    assert f"{weights}: damaged" in said and "use another checkpoint" in said
    weights.unlink()
    assert f"{weights}: missing from the checkpoint" in inspect(capsys, damaged, "--data", text, status=2)
    dense = replace(MODEL, kind="dense", num_layers=1)
    folder = write_checkpoint(tmp_path / "dense", dense, random_weights(dense, 1), tensor=1)
    assert "a model without memory layers" in inspect(capsys, folder, "--data", text, status=2)
    model = tmp_path / "model"
    list(convert(folder, model))
    assert "a converted model knows no text: add --data GLOB" in inspect(capsys, model, status=2)


def test_sparkline() -> None:
    levels = "12345678"
    assert sparkline(torch.full((64,), 9), levels) == "5" * 32
    assert sparkline(torch.tensor([0, 0, 30, 2]), levels) == "  82"
    assert sparkline(torch.tensor([1, 1]), levels, 2) == "55"
