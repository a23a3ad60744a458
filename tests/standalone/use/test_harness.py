"""A converted model in lm-evaluation-harness: our tasks, their data, padding, and what is written down."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mf_train.config import ModelConfig
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.folder import CERTIFICATE
from mf_train.standalone.use.harness import evaluate_tasks
from mf_train.standalone.use.load import load_model
from tests.standalone.checkpoints import random_weights, write_checkpoint

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "eval"
NAMES = ("mf_last_word", "mf_shuffled_sentence")
ITEMS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of random weights, far from trained."""
    folder = tmp_path_factory.mktemp("harness")
    config = ModelConfig(
        hidden_size=16, num_layers=2, num_heads=2, bits=4, expand_bits=1, vocab_size=4096, sequence_length=256
    )
    checkpoint = write_checkpoint(folder / "checkpoint", config, random_weights(config, 5), 1)
    assert list(convert(checkpoint, folder / "model"))
    return folder / "model"


def items(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / "tasks" / f"{name}.jsonl").read_text().splitlines()]


def reference(model: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """Log-probabilities of texts after contexts, one at a time without padding, summed in float64."""
    plain, tokenizer = load_model(model).double(), Tokenizer(model)
    sums = []
    for context, text in pairs:
        before, ids = len(tokenizer.encode(context)), tokenizer.encode(context + text)
        with torch.no_grad():
            logs = plain(torch.tensor([ids]))[0].double().log_softmax(-1)
        sums.append(sum(logs[i - 1, ids[i]].item() for i in range(before, len(ids))))
    return sums


def test_the_script_makes_the_shipped_data_again(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FOLDER / "make_tasks.py"), str(tmp_path)], check=True)
    for name in NAMES:
        made, shipped = ((folder / f"{name}.jsonl").read_bytes() for folder in (tmp_path, FOLDER / "tasks"))
        assert made == shipped and len(shipped) < 200_000


def test_the_choices_are_six_orders_of_the_same_words() -> None:
    for item in items("mf_shuffled_sentence"):
        assert len(item["choices"]) == len(set(item["choices"])) == 6
        assert len({tuple(sorted(choice.split())) for choice in item["choices"]}) == 1
    answers = [item["answer"] for item in items("mf_shuffled_sentence")]
    assert set(answers) == set(range(6))
    # always the same place is not better than chance
    assert max(answers.count(place) for place in range(6)) < len(answers) / 6 + 4 * math.sqrt(
        len(answers) * 5 / 36
    )


def test_scores_are_those_of_an_unpadded_float64_computation(model: Path, tmp_path: Path) -> None:
    outputs = []
    for batch_size in (1, 8):
        output = tmp_path / f"{batch_size}.json"
        lines = list(evaluate_tasks(model, NAMES, FOLDER / "tasks", batch_size, ITEMS, output))
        assert any("mf_last_word" in line for line in lines)
        outputs.append(json.loads(output.read_text()))
    first, second = (output["tasks"] for output in outputs)
    for name in NAMES:
        assert first[name]["requests_sha256"] == second[name]["requests_sha256"]
        assert first[name]["metrics"]["acc"] == second[name]["metrics"]["acc"]
        file = (FOLDER / "tasks" / f"{name}.yaml").read_bytes()
        assert first[name]["file_sha256"] == hashlib.sha256(file).hexdigest()
        assert first[name]["items"] == ITEMS
    words = [(item["context"], " " + item["word"]) for item in items("mf_last_word")[:ITEMS]]
    expected = math.exp(-sum(reference(model, words)) / ITEMS)
    for output in (first, second):
        assert output["mf_last_word"]["metrics"]["perplexity"][0] == pytest.approx(expected, rel=1e-4)
    right = 0
    for item in items("mf_shuffled_sentence")[:ITEMS]:
        logs = reference(model, [(item["context"], " " + choice) for choice in item["choices"]])
        right += logs.index(max(logs)) == item["answer"]
    for metric in ("acc", "acc_norm"):
        assert first["mf_shuffled_sentence"]["metrics"][metric][0] == pytest.approx(right / ITEMS)
    certificate = hashlib.sha256((model / CERTIFICATE).read_bytes()).hexdigest()
    assert outputs[0]["model"]["certificate_sha256"] == certificate
    assert outputs[0]["versions"]["lm_eval"] == version("lm_eval")


def test_what_cannot_be_evaluated_is_said(model: Path, tmp_path: Path) -> None:
    for tasks, include, batch_size, limit, output, said in (
        (["mf_last_word"], tmp_path / "none", 8, None, None, "no such folder"),
        (["mf_last_word"], FOLDER, 0, None, None, "--batch-size is 0"),
        (["mf_last_word"], FOLDER, 8, 0, None, "--limit is 0"),
        (["mf_last_word"], FOLDER, 8, 1, tmp_path / "none" / "o.json", "is no folder"),
    ):
        with pytest.raises(UserError, match=said):
            list(evaluate_tasks(model, tasks, include, batch_size, limit, output))
    with pytest.raises(UserError, match=r"has no config\.json"):
        list(evaluate_tasks(tmp_path, ["mf_last_word"], FOLDER))


def test_the_papers_group_has_its_six_tasks() -> None:
    group = yaml.safe_load((FOLDER / "pythia-six.yaml").read_text())
    assert sorted(group["task"]) == ["arc_challenge", "arc_easy", "logiqa", "piqa", "winogrande", "wsc"]
    assert group["aggregate_metric_list"] == [
        {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    ]


@pytest.mark.slow
def test_an_unknown_task_gets_the_nearest_name(model: Path) -> None:
    """Slow because lm-eval's own thousands of task files are read for the name."""
    with pytest.raises(UserError, match="did you mean 'mf_last_word'"):
        list(evaluate_tasks(model, ["mf_last_wrd"], FOLDER))


@pytest.mark.slow
def test_the_lm_eval_command_runs_it_without_this_project(
    model: Path, tmp_path: Path, bare_environment: Callable[[list[str]], Path]
) -> None:
    python = bare_environment(["lm_eval", "accelerate", "peft", "transformers", "torch", "sentencepiece"])
    command = [
        str(python),
        "-P",
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--device",
        "cpu",
        "--limit",
        str(ITEMS),
    ]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True", "--tasks", ",".join(NAMES)]
    command += ["--include_path", str(FOLDER), "--batch_size", "8", "--output_path", str(tmp_path / "o.json")]
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("o_*.json")
    alone = json.loads(file.read_text())["results"]
    output = tmp_path / "ours.json"
    list(evaluate_tasks(model, NAMES, FOLDER, 8, ITEMS, output))
    for name, tree in json.loads(output.read_text())["tasks"].items():
        for metric, (value, _) in tree["metrics"].items():
            assert alone[name][f"{metric},none"] == pytest.approx(value, rel=1e-5), (name, metric)
