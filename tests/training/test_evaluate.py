"""Tasks of lm-evaluation-harness on the model in training, against the same tasks on what it converts to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from mf_train.config.loading import parse_config
from mf_train.errors import UserError
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.use.harness import evaluate_tasks
from tests.training.runs import REPOSITORY, complaints, read_metrics, small_config, train, write_text

pytest.importorskip("lm_eval")
TASKS = REPOSITORY / "configs" / "eval" / "tasks"
NAMES = ["mf_last_word", "mf_shuffled_sentence"]
ITEMS = 5


def tree_of(folder: Path, tasks: list[str], include: Path = TASKS) -> dict[str, Any]:
    tree = small_config(folder / "run", write_text(folder / "text.jsonl"))
    tree["model"] |= {"sequence_length": 48, "qk_norm": True, "logit_softcap": 8.0}
    tree["optimizer"]["learning_rate"] = 0.03
    tree["training"] |= {
        "steps": 5,
        "evaluate_tasks": tasks,
        "evaluate_interval": 2,
        "evaluate_limit": ITEMS,
        "evaluate_include_path": str(include),
    }
    return tree


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (2, ("parallel.tensor=1", "parallel.zero_stage=3")),
        pytest.param(2, ("parallel.tensor=2", "parallel.zero_stage=1"), marks=pytest.mark.slow),
        pytest.param(4, ("parallel.tensor=2", "parallel.zero_stage=2"), marks=pytest.mark.slow),
    ],
    ids=["R2", "P2", "P2-R2"],
)
def test_scores_are_those_of_the_converted_model(
    processes: int, layout: tuple[str, ...], tmp_path: Path
) -> None:
    tree = tree_of(tmp_path, NAMES)
    tree["logging"]["tensorboard"] = True
    done = train(tree, *layout, processes=processes)
    found = {each["step"]: each["evaluate"] for each in read_metrics(tmp_path / "run") if "evaluate" in each}
    assert list(found) == [2, 4, 5] and found[2] != found[4] != found[5]
    assert f"step 5: mf_last_word: acc {found[5]['mf_last_word']['acc']:.4f}, perplexity" in done.stdout

    list(convert(tmp_path / "run", tmp_path / "model"))
    card = ModelCard((tmp_path / "model" / "README.md").read_text()).data.eval_results
    assert {
        task: {each.metric_type: each.metric_value for each in card if each.dataset_name == task}
        for task in NAMES
    } == found[5]
    list(evaluate_tasks(tmp_path / "model", NAMES, TASKS, 8, ITEMS, tmp_path / "scores.json"))
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    assert scores.keys() == found[5].keys()
    for name, score in scores.items():
        expected = {metric: value for metric, (value, _) in score["metrics"].items()}
        assert found[5][name] == pytest.approx(expected, rel=1e-5), name

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    drawn = events.Scalars("evaluate/mf_last_word/perplexity")
    assert [each.step for each in drawn] == [2, 4, 5]
    assert drawn[-1].value == pytest.approx(found[5]["mf_last_word"]["perplexity"], rel=1e-6)


def test_a_task_that_generates_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_data.py").write_text((TASKS / "local_data.py").read_text())
    (tmp_path / "tasks" / "mf_last_word.jsonl").write_text((TASKS / "mf_last_word.jsonl").read_text())
    text = (TASKS / "mf_last_word.yaml").read_text()
    text = text.replace("task: mf_last_word", "task: mf_writes").replace(
        ": loglikelihood", ": generate_until"
    )
    text = text[: text.index("  - metric: perplexity")].replace("metric: acc", "metric: exact_match")
    (tmp_path / "tasks" / "mf_writes.yaml").write_text(text)
    tree = tree_of(tmp_path, ["mf_writes"], tmp_path / "tasks")
    (line,) = complaints(train(tree, expect=2))
    assert (
        "training.evaluate_tasks mf_writes: its requests are generate_until, and a model in training" in line
    )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_interval_without_tasks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"evaluate_interval is 2 and training\.evaluate_tasks is empty: name"
    ):
        parse_config(tree_of(tmp_path, []), "here")
