"""A study's file: what it may hold, and how each mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.errors import UserError
from mf_train.study.study import load_study

GOOD: dict[str, Any] = {
    "base": "configs/quickstart.yaml",
    "output_dir": "runs/studies/x",
    "processes": 2,
    "settings": {"training.validation_interval": 50},
    "axes": {
        "size": {"depths": [2, 3], "width": 48, "head_size": 48},
        "tokens": ["1e6", 2_000_000],
        "learning_rate": [1e-3, "3e-3"],
        "bits": [4, 6],
        "expand_bits": [0, 2],
        "kind": ["memoryformer", "dense"],
        "seed": [0, 1],
        "optimizer.weight_decay": [0.0, 0.1],
        "variant": [{"name": "gelu", "model.ffn_activation": "gelu"}, {"model.score": "scaled_probability"}],
    },
    "budget": {"flops": "1e18", "memory_gb": 40},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def test_every_kind_of_axis(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    axes = {axis.name: axis.values for axis in study.axes}
    assert axes["size"][1].settings == (
        ("model.num_layers", 3),
        ("model.hidden_size", 144),
        ("model.num_heads", 3),
    )
    assert [value.length for value in axes["tokens"]] == [1e6, 2e6]
    assert axes["seed"][1].settings == (("training.seed", 1), ("data.seed", 1))
    assert axes["optimizer.weight_decay"][0].settings == (("optimizer.weight_decay", 0.0),)
    assert [value.label for value in axes["variant"]] == ["gelu", "model.score=scaled_probability"]
    assert study.processes == 2 and study.budget.flops == 1e18 and study.budget.memory_gb == 40


def axes(**changes: Any) -> dict[str, Any]:
    return {"axes": changes}


LADDER = {"depths": [2], "width": 48, "head_size": 48}
MISTAKES = [
    ({"bases": "x"}, "unknown key bases: did you mean 'base'"),
    ({"base": None}, "base is None: give the configuration"),
    ({"output_dir": 3}, "output_dir is 3: give the folder"),
    ({"output_dir": "runs/{task}"}, "must have no braces"),
    ({"processes": 0}, "processes is 0"),
    ({"processes": True}, "processes is True"),
    ({"settings": [1]}, "settings is .1.: expected dotted keys"),
    ({"settings": {"model.bit": 4}}, "settings: unknown key 'model.bit': did you mean 'bits'"),
    ({"settings": {"model.bits": "four"}}, "model.bits is 'four': expected a whole number"),
    ({"settings": {"model": {}}}, "model is a section"),
    ({"settings": {"training.output_dir": "x"}}, "training.output_dir is not for a study to set"),
    ({"axes": {}}, "expected names and lists"),
    (axes(sede=[1]), "unknown axis 'sede': did you mean 'seed'"),
    (axes(zzz=[1]), "unknown axis 'zzz': choose of size"),
    (axes(**{"training.seed": [0, 1]}), "axes.training.seed: name the axis seed"),
    (axes(bits=[]), "axes.bits is .*: expected a list"),
    (axes(bits=4), "axes.bits is 4: expected a list"),
    (axes(bits=[4, 4]), "axes.bits: 4 stands twice"),
    (axes(bits=[4.5]), "model.bits is 4.5: expected a whole number"),
    (axes(kind=["sparse"]), "choose one of memoryformer, dense"),
    (axes(tokens=[-1]), "axes.tokens is -1: expected a number above 0"),
    (axes(tokens=["many"]), "axes.tokens is 'many'"),
    (axes(tokens=[True]), "axes.tokens is True"),
    (axes(tokens=[1e6], flops=[1e12]), "flops and tokens both set training.steps"),
    (axes(size=[1, 2]), "axes.size is .* expected depths"),
    (axes(size=LADDER | {"dept": 1}), "axes.size: unknown key dept"),
    (axes(size=LADDER | {"width": 0}), "axes.size.width is 0"),
    (axes(size=LADDER | {"depths": [2, 2]}), "a depth stands twice"),
    (axes(size=LADDER | {"depths": ["2"]}), "axes.size.depths"),
    (axes(variant=[{"name": "a"}]), "axes.variant.0. is .*expected dotted keys"),
    (axes(variant=[{"model.bitz": 3}]), "axes.variant.0.: unknown key 'model.bitz'"),
    (axes(**{"bits": [4], "model.bits": [6]}), "model.bits is set by axes.bits and by axes.model.bits"),
    (axes(**{"training.validation_interval": [5]}), "set by settings and by axes"),
    (axes(**{"tokens": [1e6], "training.steps": [5]}), "training.steps is set by axes.tokens"),
    ({"budget": {"flop": 1}}, "unknown key budget.flop: did you mean 'flops'"),
    ({"budget": {"flops": "x"}}, "budget.flops is 'x'"),
    ({"budget": {"hours": 1}}, "needs budget.device"),
    ({"budget": {"device": "h1000"}}, "budget.device: h1000: choose one of"),
    ({"budget": {"processes_per_node": 0}}, "budget.processes_per_node is 0"),
    ({"budget": {"processes_per_node": 3}}, "processes_per_node 3 does not divide processes 2"),
    ({"budget": 5}, "budget is 5"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_study(write(tmp_path, **changes))
    assert "study.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_size_whose_heads_do_not_divide_is_marked(tmp_path: Path) -> None:
    ladder = {"depths": [2, 3], "width": 32, "head_size": 64}
    study = load_study(write(tmp_path, axes={"size": ladder}))
    assert [value.problem for value in study.axes[0].values] == [
        "",
        "size.head_size 64 does not divide depth 3 * width 32",
    ]
