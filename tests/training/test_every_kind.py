"""Kinds of attention and layers through the whole system: trained, killed, resumed elsewhere, converted, used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mf_train.checkpoint.layout import resolve_checkpoint
from mf_train.model.attention.kinds import KINDS
from mf_train.standalone.conversion.check import check_conversion
from mf_train.standalone.conversion.convert import convert
from mf_train.standalone.folder import read_config
from mf_train.standalone.use.evaluate import evaluate
from mf_train.standalone.use.generate import generate
from tests.standalone.checkpoints import certificate_of
from tests.training.runs import has_steps, read_metrics, small_config, start, train, wait_for, write_text

MODELS: dict[str, dict[str, Any]] = {
    kind: {"attention": kind, "full_attention_layers": [1], "qk_norm": True}
    for kind in KINDS
    if kind != "softmax"
}
MODELS["performer"]["attention_redraw"] = 2
MODELS |= {
    "dense": {"kind": "dense"},
    "low rank": {"kind": "dense", "qkv": "low_rank", "ffn": "low_rank", "output": "low_rank", "rank": 8},
    "tables in the FFN": {"kind": "dense", "ffn": "memory"},
    "matrices in the FFN": {"ffn": "dense", "output": "memory"},
    "product keys": {"ffn": "product_key", "product_keys": 16, "product_query": 8, "product_reads": 3},
    "rotated": {"rotation": True, "output": "memory"},
    "low rank beside tables": {"residual_rank": 4, "attention": "flow"},
}
# processes and tensor-parallel degree before the kill and after it, and the stage of ZeRO
SHAPES = [((1, 1), (2, 2), 1), ((2, 2), (2, 1), 2), ((2, 1), (4, 2), 3)]


def configuration(folder: Path, model: str, documents: bool) -> dict[str, Any]:
    tree = small_config(folder, write_text(folder.parent / "text.jsonl"))
    tree["model"] |= {
        "attention_window": 8,
        "attention_segment": 8,
        "attention_rank": 3,
        "attention_slots": 4,
    }
    tree["model"] |= {"num_layers": 3, **MODELS[model]}
    tree["data"] |= {"document_attention": documents, "workers": 0}
    tree["checkpoint"] = {"interval": 2}
    return tree


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("index", "name"), list(enumerate(MODELS)), ids=list(MODELS))
def test_a_run_of_every_kind(index: int, name: str, tmp_path: Path) -> None:
    before, after, stage = SHAPES[index % len(SHAPES)]
    tree = configuration(tmp_path / "run", name, documents=index % 2 == 0)
    tree["parallel"] = {"zero_stage": stage, "tensor": before[1]}
    tree["training"]["steps"] = 10_000
    running = start(tree, processes=before[0])
    wait_for(lambda: has_steps(tree, 3) and list(tmp_path.glob("run/checkpoints/step-*")))
    running.kill()
    running.communicate()
    steps = int(resolve_checkpoint(tmp_path / "run").name.removeprefix("step-")) + 4
    tree["training"]["steps"] = steps
    tree["parallel"]["tensor"] = after[1]
    train(tree, processes=after[0])
    undisturbed = configuration(tmp_path / "undisturbed", name, documents=index % 2 == 0)
    undisturbed["training"]["steps"] = steps
    train(undisturbed)
    found, expected = (read_metrics(tmp_path / name) for name in ("run", "undisturbed"))
    assert [line["step"] for line in found] == list(range(1, steps + 1))
    assert [line["batch_digest"] for line in found] == [line["batch_digest"] for line in expected]
    losses = [line["loss"] for line in expected]
    # other numbers of ranks round otherwise, and a code may change where a value rounds across zero
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-3)
    assert losses[-1] < losses[0] - 0.1

    checkpoint, model = resolve_checkpoint(tmp_path / "run"), tmp_path / "model"
    list(convert(checkpoint, model))
    list(check_conversion(checkpoint, model))
    probe = certificate_of(model)["probe"]
    assert probe["largest_logit_difference"] < 1e-4 and not any(probe["changed_codes"].values())
    text = "".join(generate(model, "The union of states", max_new_tokens=8))
    assert text.startswith("The union of states") and len(text) > 20
    assert any(line.startswith("perplexity") for line in evaluate(model, [str(tmp_path / "text.jsonl")]))


def test_random_features_are_drawn_anew(tmp_path: Path) -> None:
    """Steps 1 and 2 have the first drawing, 3 and 4 the second, 5 the third, also where a run goes on after step 3."""
    losses = {}
    for name, steps, redraw in (("once", (5,), 0), ("anew", (5,), 2), ("resumed", (3, 5), 2)):
        tree = configuration(tmp_path / name, "performer", documents=False)
        tree["model"] |= {"num_layers": 2, "attention_redraw": redraw, "attention_seed": 7}
        for tree["training"]["steps"] in steps:
            train(tree)
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name)]
    assert losses["anew"] == losses["resumed"] and losses["anew"][:2] == losses["once"][:2]
    assert losses["anew"][2] != losses["once"][2]
    list(convert(tmp_path / "anew", tmp_path / "model"))
    config, _, _ = read_config(tmp_path / "model")
    assert (config.attention_seed, config.attention_redraw) == (9, 2)
    assert certificate_of(tmp_path / "model")["probe"]["largest_logit_difference"] < 1e-4
