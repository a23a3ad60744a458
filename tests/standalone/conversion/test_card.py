"""The model card: its metadata by the hub's own reader, what it says of data, and what it keeps to itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mf_train.config.loading import parse_config
from mf_train.config.phases import phases_of
from mf_train.config.sections import SourceConfig
from mf_train.errors import UserError
from mf_train.standalone.conversion.card import model_card, shown_source
from mf_train.standalone.conversion.check import check_conversion
from mf_train.standalone.conversion.convert import convert
from tests.standalone.checkpoints import certificate_of
from tests.standalone.conftest import Trained
from tests.training.runs import read_metrics

PARTS = {
    "data": {
        "train": [{"path": "/srv/secret-project/pages/*.jsonl.gz", "weight": 2}, {"hub": "owner/words"}],
        "validation": [
            {"hub": "owner/words", "hub_config": "small", "split": "validation"},
            {"path": "/home/someone/held-out.txt", "name": "held-out: ours"},
        ],
    },
    "training": {"steps": 40},
    "phases": [
        {"name": "annealing", "start": 21, "data": {"train": [{"hub": "other/code", "hub_config": "v2"}]}},
        {"name": "late", "start": 31, "data": {"train": [{"hub": "late/words"}]}},
    ],
}
METRICS = {
    "validation_loss": 3.0,
    "validation_step": 24,
    "validation": {
        "0": {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": None},
        "held-out: ours": {"loss": 3.5, "perplexity": 33.1, "bits_per_byte": 1.25},
    },
    "evaluate": {"lambada": {"acc": 0.25, "perplexity": None}, "broken": {"acc": float("nan")}},
    "evaluate_step": 20,
}


def card_of(trained: Trained, metrics: dict[str, Any], **more: Any) -> ModelCard:
    """Of another configuration and other figures, as of step 24."""
    phases = phases_of(parse_config(PARTS, "the test"))[:2]
    certificate = certificate_of(trained.model) | more
    certificate["source"] |= {"metrics": metrics}
    return ModelCard(model_card(phases, certificate).decode())


def test_the_hub_reads_what_the_run_measured(float32_two: Trained) -> None:
    card = ModelCard((float32_two.model / "README.md").read_text())
    data = card.data.to_dict()
    assert {key: data[key] for key in ("library_name", "pipeline_tag", "tags")} == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["memoryformer"],
    }
    assert not data.keys() & {"license", "datasets"}
    measured = read_metrics(float32_two.run)[-1]["validation"]["0"]
    found = {each.metric_type: each for each in card.data.eval_results}
    assert {name: each.metric_value for name, each in found.items()} == measured
    assert found["loss"].dataset_name == "text.jsonl" and found["loss"].task_type == "text-generation"
    assert found["loss"].metric_name == "loss in validation after step 3"


def test_every_set_and_task_is_a_result(float32_two: Trained) -> None:
    card = card_of(float32_two, METRICS, license="mit")
    assert card.data.license == "mit" and "under the licence `mit`" in card.text
    assert card.data.datasets == ["owner/words", "other/code"]  # and not those of a later phase
    results = {
        (each.dataset_name, each.dataset_type, each.metric_type): (each.metric_value, each.metric_name)
        for each in card.data.eval_results
    }
    assert results == {
        ("owner/words", "owner/words", "loss"): (2.5, "loss in validation after step 24"),
        ("owner/words", "owner/words", "perplexity"): (12.18, "perplexity in validation after step 24"),
        ("held-out: ours", "text", "loss"): (3.5, "loss in validation after step 24"),
        ("held-out: ours", "text", "perplexity"): (33.1, "perplexity in validation after step 24"),
        ("held-out: ours", "text", "bits_per_byte"): (1.25, "bits per byte in validation after step 24"),
        ("lambada", "lambada", "acc"): (0.25, "acc in training after step 20"),
    }


def test_a_run_that_measured_nothing_has_no_results(float32_two: Trained) -> None:
    assert card_of(float32_two, {}).data.eval_results is None
    older = card_of(float32_two, {"validation_loss": 3.0})  # of a checkpoint that has the mean alone
    (result,) = older.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("validation", 3.0)


def test_the_text_names_the_data_of_every_phase(float32_two: Trained) -> None:
    text = card_of(float32_two, METRICS).text
    words = "[owner/words](https://huggingface.co/datasets/owner/words)"
    assert f"Trained on:\n\n- `pages/*.jsonl.gz`, weight 2\n- {words}, split `train`, weight 1\n" in text
    code = "[other/code](https://huggingface.co/datasets/other/code), configuration `v2`"
    assert f"Trained on from step 21 on:\n\n- {code}, split `train`, weight 1\n" in text
    assert f"Validated on:\n\n- {words}, configuration `small`, split `validation`, weight 1\n" in text
    for private in ("/srv", "secret-project", "someone", "late/words"):
        assert private not in text


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("configs/text/train/*.jsonl.gz", "configs/text/train/*.jsonl.gz"),
        ("corpus.txt", "corpus.txt"),
        ("/srv/alice/corpus.txt", "corpus.txt"),
        ("/srv/alice/pile/**/part-[0-9]*.jsonl", "pile/**/part-[0-9]*.jsonl"),
        ("/home/alice/*.jsonl", "*.jsonl"),
        ("/home/alice/pile/*.jsonl", "pile/*.jsonl"),
        ("/home/alice", "*"),
        ("/Users/alice/pile", "pile"),
        ("../../alice/pile/*.txt", "pile/*.txt"),
        ("../*.txt", "*.txt"),
        ("file:///home/alice/pile/*.txt", "pile/*.txt"),
        ("https://alice:secret@host.org/a/text.gz?signature=secret#x", "https://host.org/a/text.gz"),
        ("s3://key:secret@bucket/text/part-?.gz", "s3://bucket/text/part-?.gz"),
        ("hf://datasets/owner/words/*.parquet", "hf://datasets/owner/words/*.parquet"),
    ],
)
def test_private_places_are_not_told(path: str, shown: str) -> None:
    assert shown_source(SourceConfig(path=path)) == shown


def test_a_licence_is_named_and_checked(float32_one: Trained, tmp_path: Path) -> None:
    list(convert(float32_one.checkpoint, tmp_path / "out", license_name="apache-2.0"))
    metadata = (tmp_path / "out" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(metadata)["license"] == "apache-2.0"
    *_, last = check_conversion(float32_one.checkpoint, tmp_path / "out")
    assert last.endswith("in float32")
    for name in ("Apache 2.0", "", "MIT", "a\nb"):
        with pytest.raises(UserError, match=r"--license is .*: give the hub's identifier"):
            list(convert(float32_one.checkpoint, tmp_path / "other", license_name=name))
    assert not (tmp_path / "other").exists()
