"""A run with a tokenizer of others: trained, resumed, converted, used, and back to a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mf_train.checkpoint.layout import resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import TokenizerConfig
from mf_train.data.open_tokenizer import load_tokenizer
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.conversion.to_checkpoint import to_checkpoint
from mf_train.standalone.use.generate import _texts, generate
from tests.tokenizers_of_others import OTHER_SCRIPTS, write
from tests.training.runs import read_metrics, small_config, train, write_text


@pytest.mark.parametrize("kind", ["llama3", pytest.param("llama", marks=pytest.mark.slow)])
def test_from_training_to_use_and_back(kind: str, tmp_path: Path) -> None:
    path = write(kind, tmp_path)
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["tokenizer"]["path"] = str(path)
    tree["data"]["workers"] = 1
    tree["training"]["steps"] = 2
    train(tree)
    tree["training"]["steps"] = 4
    train(tree)
    straight = json.loads(json.dumps(tree))
    straight["training"]["output_dir"] = str(tmp_path / "straight")
    straight["data"]["workers"] = 0
    train(straight)
    resumed, whole = (read_metrics(tmp_path / run) for run in ("run", "straight"))
    assert [record["batch_digest"] for record in resumed] == [record["batch_digest"] for record in whole]

    tokenizer = load_tokenizer(TokenizerConfig(path=str(path)))
    checkpoint = CheckpointReader(resolve_checkpoint(tmp_path / "run"))
    assert checkpoint.read_tokenizer() == tokenizer.files
    lines = list(convert(tmp_path / "run", tmp_path / "model"))
    assert any(line.startswith("certificate") for line in lines)
    assert (
        json.loads((tmp_path / "model" / "config.json").read_bytes())["eos_token_id"]
        == tokenizer.end_of_text_id
    )
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "The state  of the Union\n\n1848"
    assert fast(text).input_ids == tokenizer.encode(text)
    assert "".join(generate(tmp_path / "model", text, 3)).startswith(text)
    list(to_checkpoint(tmp_path / "model", tmp_path / "back", 1))
    back = TokenizerConfig(path=str(tmp_path / "back"), end_of_text_id=tokenizer.end_of_text_id)
    assert load_tokenizer(back).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("kind", ["llama", "gemma", "neox"])
def test_a_text_that_is_written_in_pieces_keeps_its_spaces(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TokenizerConfig(path=str(write(kind, tmp_path))))
    text = f"The state  of the union, {OTHER_SCRIPTS} as it is"
    ids = tokenizer.encode(text)
    for cut in (0, 1, 4):
        before = tokenizer.decode(ids[:cut])
        assert before + "".join(_texts(iter(ids[cut:]), tokenizer, ids[:cut])) == text
