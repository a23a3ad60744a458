"""What a configuration's `phases` mean, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from mf_train.config import Config, SourceConfig
from mf_train.config.loading import config_to_tree, parse_config
from mf_train.config.phases import Phase, phase_at, phases_of
from mf_train.config.schedule import learning_rate, rate_of
from mf_train.errors import UserError

WEB, CODE = {"path": "web.jsonl", "weight": 3.0}, {"path": "code.jsonl"}


def make(*phases: dict[str, Any], **sections: dict[str, Any]) -> Config:
    training = {"steps": 100, "global_batch_size": 4} | sections.pop("training", {})
    return parse_config({"training": training, **sections, "phases": list(phases)}, "run.yaml")


def test_a_phase_builds_upon_the_one_before() -> None:
    config = make(
        {"name": "ramp", "start": 11, "training": {"global_batch_size": 8}, "optimizer": {"eps": "1e-9"}},
        {"name": "code", "start": 31, "data": {"train": [CODE]}, "training": {"z_loss": 1e-4}},
        {"name": "long", "start": 100, "model": {"sequence_length": 4096}},
        data={"train": [WEB], "seed": 3},
        training={"z_loss": 1e-3, "seed": 5},
    )
    main, ramp, code, long = phases_of(config)
    assert [(each.name, each.first, each.last) for each in phases_of(config)] == [
        ("main", 1, 10),
        ("ramp", 11, 30),
        ("code", 31, 99),
        ("long", 100, 100),
    ]
    assert not any(each.config.phases for each in phases_of(config))
    assert [each.config.training.global_batch_size for each in (main, ramp, code, long)] == [4, 8, 8, 8]
    assert [each.config.optimizer.eps for each in (main, ramp, long)] == [1e-8, 1e-9, 1e-9]
    assert ramp.config.data == main.config.data
    assert long.config.data == code.config.data
    assert code.config.data.train == (SourceConfig(path="code.jsonl"),) and code.config.data.seed == 3
    assert [each.config.training.z_loss for each in (ramp, code)] == [1e-3, 1e-4]
    assert long.config.model.sequence_length == 4096 and long.config.training.seed == 5
    assert parse_config(config_to_tree(config), "again") == config
    assert [phase_at(config, step).name for step in (1, 10, 11, 99, 100, 101)] == [
        *("main", "main", "ramp", "code", "long", "long")
    ]


def test_what_is_recorded_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORPUS", "/data")
    phase = {
        "name": "a",
        "start": 11,
        "data": {"train": [{"path": "$CORPUS/a"}]},
        "optimizer": {"eps": "1e-9"},
    }
    tree = config_to_tree(make(phase))
    monkeypatch.delenv("CORPUS")
    assert phases_of(parse_config(tree, "again"))[1].config.data.train == (SourceConfig(path="/data/a"),)
    assert tree["phases"][0]["optimizer"] == {"eps": 1e-9}


def test_a_run_without_phases_is_one() -> None:
    config = make()
    assert phases_of(config) == (Phase("main", 1, 100, config, range(1, 101)),)


def test_schedules_count_from_their_phase_to_the_next_schedule() -> None:
    config = make(
        {"name": "more", "start": 21, "training": {"global_batch_size": 8}},
        {"name": "anneal", "start": 61, "schedule": {"kind": "linear", "warmup_steps": 2}},
        {"name": "longer", "start": 81, "optimizer": {"learning_rate": 0.5}},
        schedule={"kind": "warmup_stable_decay", "warmup_steps": 10, "decay_steps": 5, "on_change": "follow"},
        optimizer={"learning_rate": 1.0},
    )
    phases = phases_of(config)
    rates = [rate_of(phase, step) for phase in phases for step in range(phase.first, phase.last + 1)]
    main, _, anneal, longer = (each.config.schedule for each in phases)
    assert rates[:60] == [learning_rate(step, 60, 1.0, main) for step in range(1, 61)]
    assert rates[60:80] == [learning_rate(step, 40, 1.0, anneal) for step in range(1, 21)]
    assert rates[80:] == [learning_rate(step, 40, 0.5, longer) for step in range(21, 41)]
    assert anneal.decay_steps is None and anneal.on_change == "follow"


AT = {"name": "a", "start": 11}


@pytest.mark.parametrize(
    ("phases", "words"),
    [
        ([{"start": 11}], "phases[0].name is '': give each phase a name of its own"),
        ([{"name": "main", "start": 11}], "phases[0].name is 'main': give each phase a name of its own"),
        ([AT, AT | {"start": 12}], "phases[1].name is 'a': give each phase a name of its own"),
        ([{"name": "a"}], "phases[0].start is 1: a phase begins after step 1"),
        ([AT | {"start": 0}], "phases[0].start is 0: it must be a number above 0"),
        ([AT | {"start": 101}], "phases[0].start is 101: a phase begins after step 1, with which the one before"),
        ([AT, {"name": "b", "start": 11}], "phases[1].start is 11: a phase begins after step 11"),
        ([AT, {"name": "b", "start": 5}], "phases[1].start is 5: a phase begins after step 11"),
        ([AT | {"end": 20}], "unknown key 'phases[0].end': known keys: name, start, model"),
        ([AT | {"parallel": {"tensor": 2}}], "unknown key 'phases[0].parallel': known keys: name, start, model"),
        ([AT | {"optimiser": {}}], "unknown key 'phases[0].optimiser': did you mean 'optimizer'?"),
        ([AT | {"data": [CODE]}], "phases[0].data is [{'path': 'code.jsonl'}]: expected keys and values"),
        ([AT | {"training": {"steps": 50}}], "phases[0]: a phase cannot change training.steps: it may have glob"),
        ([AT | {"model": {"bits": 4}}], "a phase cannot change model.bits: it may have sequence_length"),
        ([AT | {"training": {"global_batch": 5}}], "training.global_batch: did you mean 'global_batch_size'?"),
        ([AT | {"data": {"skip_steps": [3]}}], "phases[0]: a phase cannot change data.skip_steps: "),
        ([AT | {"schedule": {"on_change": "follow"}}], "a phase cannot change schedule.on_change: "),
        ([AT | {"training": {"global_batch_size": 0}}], "phases[0]: training.global_batch_size is 0: it must be"),
        ([AT | {"model": {"sequence_length": 0}}], "phases[0]: model.sequence_length is 0: it must be at least 1"),
        ([AT | {"data": {"train": [{"hub": "a", "path": "b"}]}}], "phases[0]: data.train[0]: give either 'path'"),
        ([AT | {"data": {"train": [{"pth": "b"}]}}], "phases[0]: unknown key 'data.train[0].pth': did you mean"),
        (
            [AT, {"name": "b", "start": 96, "schedule": {"kind": "warmup_stable_decay", "warmup_steps": 6}}],
            "phases[1]: schedule has 6 steps of warm-up and 1 of decay, and it goes over 5 steps: lower",
        ),
        ({"name": "a", "start": 11}, "phases is {'name': 'a', 'start': 11}: expected a list"),
    ],
)  # fmt: skip
def test_phases_that_no_run_can_have(phases: Any, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_config({"training": {"steps": 100}, "phases": phases}, "run.yaml")
    assert words in str(refusal.value) and str(refusal.value).startswith("run.yaml: ")


def test_profiled_steps_are_of_one_phase() -> None:
    for start in (8, 11):
        make(AT, training={"profile": {"steps": 3, "start": start}})
    with pytest.raises(
        UserError, match="steps 9 to 11 and phase 'a' begins at step 11: profile steps of one"
    ):
        make(AT, training={"profile": {"steps": 3, "start": 9}})
