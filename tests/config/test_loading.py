"""YAML and overrides to a Config: what loads, and the one line of every mistake."""

from __future__ import annotations

import dataclasses
import math
import pwd
import random
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.config import (
    Config,
    GroupConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    ProfileConfig,
    ScheduleConfig,
    SourceConfig,
    ValidationConfig,
)
from mf_train.config.loading import config_to_tree, load_config, parse_config
from mf_train.config.yaml_text import parse_yaml, yaml_text
from mf_train.errors import UserError


def load(folder: Path, text: str | bytes, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, overrides)


def mistake(folder: Path, text: str | bytes, *overrides: str) -> str:
    """The message of the refusal, which must be one line that names the file and the overrides, or one of these."""
    with pytest.raises(UserError) as refusal:
        load(folder, text, *overrides)
    message = str(refusal.value)
    assert "\n" not in message
    everything = " with ".join([str(folder / "run.yaml"), *overrides])
    assert message.startswith((f"{everything}: ", f"{folder / 'run.yaml'}: ", "override "))
    return message


def test_values_and_defaults(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "model: {hidden_size: 48, bits: 4, num_heads: 3, temperature: 2}\n"
        "optimizer: {learning_rate: 3e-4, betas: [0.8, 0.9]}\n"
        "data: {train: [{path: a.txt, weight: 2}, {hub: owner/name}]}\n"
        "training:\n",
    )
    assert config == Config(
        model=ModelConfig(hidden_size=48, bits=4, num_heads=3, temperature=2.0),
        optimizer=OptimizerConfig(learning_rate=3e-4, betas=(0.8, 0.9)),
        data=dataclasses.replace(
            Config().data, train=(SourceConfig(path="a.txt", weight=2.0), SourceConfig(hub="owner/name"))
        ),
    )
    assert type(config.model.temperature) is float and type(config.data.train[0].weight) is float
    assert load(tmp_path, "") == Config()


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "training: {steps: 1, seed: 7}",
        "training.steps=2",
        "training.steps=3",
        "optimizer.learning_rate=3e-4",
        "training.output_dir=runs/a=b",
        "data.validation=[{path: v.txt}]",
        "schedule.warmup_steps=",
    )
    assert (config.training.steps, config.training.seed) == (3, 7)
    assert config.optimizer.learning_rate == 3e-4
    assert config.training.output_dir == "runs/a=b"
    assert config.data.validation == (ValidationConfig(path="v.txt"),)
    assert config.schedule.warmup_steps is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0100", 100),
        ("-007", -7),
        ("08", 8),
        ("1_000_000", 1_000_000),
        ("0x1F", 31),
        ("1000000000000000000", 10**18),
        ("1.50", 1.5),
        ("1.0e-05", 1e-5),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        *(
            (text, text)
            for text in ("no", "on", "1:30", "1:30:00.5", "0o17", "0b1", "2024-11-30", "1e-3", "1.2.3")
        ),
    ],
)
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    """YAML 1.1 has octal, base 60, dates and a Norwegian `no`."""
    found = parse_yaml(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)
    for again in (parse_yaml(yaml_text({"a": value})), yaml.safe_load(yaml_text({"a": value}))):
        assert again == {"a": value}


def test_a_switch_may_be_yes_or_no(tmp_path: Path) -> None:
    logging = load(tmp_path, "logging: {tensorboard: No}\ntraining: {bind_cores: off}")
    assert not logging.logging.tensorboard and not logging.training.bind_cores
    assert load(tmp_path, "training: {deterministic: yes}").training.deterministic
    assert (
        load(tmp_path, "data: {train: [{hub: wikipedia, hub_config: no}]}").data.train[0].hub_config == "no"
    )


def test_home_and_variables_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-mine")
    monkeypatch.setenv("MF_PLACE", "/scratch/a b")
    root = pwd.getpwuid(0).pw_dir
    config = load(
        tmp_path,
        "data: {train: [{path: ~/corpus/*.gz}, {path: 's3://${MF_PLACE}/$'}], cache: $MF_PLACE/cache}",
        "training.output_dir=~/runs/$MF_PLACE",
        "tokenizer.path=~root/tokenizer",
        "checkpoint.resume=$MF_PLACE",
        "data.validation=[{path: a~b}]",
        "model.norm=rmsnorm",
    )
    assert [source.path for source in config.data.train] == [
        "/home/of-mine/corpus/*.gz",
        "s3:///scratch/a b/$",
    ]
    assert config.data.cache == "/scratch/a b/cache" and config.data.validation[0].path == "a~b"
    assert config.training.output_dir == "/home/of-mine/runs//scratch/a b"
    assert config.tokenizer.path == f"{root}/tokenizer" and config.checkpoint.resume == "/scratch/a b"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "data.train=[{path: ~mf-nobody/x}]",
            "data.train[0].path is '~mf-nobody/x': no home folder of a user 'mf-nobody' is known: write the whole "
            "path, or ./~mf-nobody/x",
        ),
        ("data.cache=~mf-nobody", "data.cache is '~mf-nobody': no home folder of a user 'mf-nobody'"),
        (
            "training.output_dir=$MF_NOWHERE/run",
            "training.output_dir is '$MF_NOWHERE/run': the environment variable MF_NOWHERE is not set: set it, or",
        ),
        ("checkpoint.resume=${MF_NOWHERE}", "the environment variable MF_NOWHERE is not set"),
        ("tokenizer.path=a/$MF_NOWHERE", "the environment variable MF_NOWHERE is not set"),
    ],
)
def test_paths_of_nobody(override: str, words: str, tmp_path: Path) -> None:
    assert words in mistake(tmp_path, "", override)


def test_a_run_s_own_config_loads_again(tmp_path: Path) -> None:
    assert load(tmp_path, "versions: {torch: 2.13.0}\ntraining: {steps: 5}").training.steps == 5


def test_anchors_and_merges(tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "data:\n  train: [&source {path: a.txt, weight: 3}]\n  validation: [{<<: *source, path: b.txt}]\n",
    )
    assert config.data.validation == (ValidationConfig(path="b.txt", weight=3.0),)


@pytest.mark.parametrize("seed", range(20))
def test_round_trip(seed: int, tmp_path: Path) -> None:
    """A config with every value drawn at random comes back from YAML as it was."""
    config = random_config(random.Random(seed))
    assert parse_config(config_to_tree(config), "here") == config
    assert load(tmp_path, yaml_text(config_to_tree(config))) == config


def random_config(dice: random.Random) -> Config:
    bits, tables = dice.randint(1, 8), dice.randint(1, 6)
    special: dict[str, Any] = {
        "bits": bits,
        "hidden_size": bits * tables + bits,
        "num_heads": dice.choice([1, bits, tables + 1]),
        "expand_bits": dice.randint(0, 3),
        "qkv": dice.choice([None, "memory", "dense"]),
        "ffn": dice.choice([None, "low_rank"]),
        "output": "low_rank",
        "rank": 1,
        "product_reads": 1,
        "rotation": False,  # not every model has what it turns
        "residual_rank": 0,
        "rotary_fraction": dice.random(),
        "attention": dice.choice(["window", "performer", "cosformer", "flow", "luna_filtered", "ecoformer"]),
        "full_attention_layers": dice.choice([(), (0,)]),
        "schedule": dice.choice(
            [
                ScheduleConfig(kind="warmup_stable_decay", warmup_steps=0, decay_steps=1),
                ScheduleConfig(kind="linear", minimum_fraction=dice.random(), decay_fraction=dice.random()),
            ]
        ),
        "alarm_rows_read": dice.random(),
        "alarm_entropy": dice.random(),
        "alarm_largest_share": dice.random(),
        "betas": (dice.random(), dice.random()),
        "zero_stage": dice.randrange(4),
        "master": "float32",  # split needs bfloat16
        "hub": None,
        "z_loss": dice.random() / 100,
        "evaluate_tasks": ("text", "08"),  # its interval needs some
        "average_decay": dice.random(),
        "width_rule": "mup",
        "skip_steps": (dice.randint(1, 99), "100-101"),
        "phases": (PhaseConfig(name="0: 'a'", start=2, data={"cache": "1:30"}, optimizer={"eps": 1e-9}),),
        "profile": ProfileConfig(start=1, steps=dice.randrange(2), ranks=(0, dice.randint(1, 99))),
    }

    def value(annotation: Any, name: str) -> Any:
        if name == "name":
            return str(dice.random())  # two validation sets have different ones
        if annotation is GroupConfig and name in ("tables", "ffn_tables", "matrices", "attention"):
            return GroupConfig()  # which not every model has
        if name in special:
            return special[name]
        if dataclasses.is_dataclass(annotation):
            return section(typing.cast(type, annotation))
        if typing.get_origin(annotation) is tuple:
            return tuple(section(typing.get_args(annotation)[0]) for _ in range(dice.randrange(3)))
        if typing.get_origin(annotation) is typing.Literal:
            return dice.choice(typing.get_args(annotation))
        if annotation is bool:
            return dice.random() < 0.5
        if annotation in (float, float | None):
            return dice.choice([1.0, 1e-8, 3e-4, dice.uniform(0.1, 1e5)])
        if annotation in (int, int | None):
            return dice.randint(1, 10**6)
        return dice.choice(["text", "3", "true", "null", "1e-3", "08", "1:30", "no", "ä b: c #d", "'\""])

    def section(kind: type) -> Any:
        hints = typing.get_type_hints(kind)
        return kind(
            **{field.name: value(hints[field.name], field.name) for field in dataclasses.fields(kind)}
        )

    config: Config = section(Config)
    return config


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("modle: {}", "modle", "model"),
        ("model: {hiden_size: 8}", "model.hiden_size", "hidden_size"),
        ("optimizer: {lerning_rate: 1}", "optimizer.lerning_rate", "learning_rate"),
        ("data: {train: [{path: a, wieght: 1}]}", "data.train[0].wieght", "weight"),
    ],
)
def test_misspelt_keys_name_the_nearest(text: str, key: str, near: str, tmp_path: Path) -> None:
    assert mistake(tmp_path, text).endswith(f"unknown key {key!r}: did you mean {near!r}?")


def test_a_misspelt_override_names_the_nearest(tmp_path: Path) -> None:
    assert "unknown key 'training.stpes': did you mean 'steps'?" in mistake(tmp_path, "", "training.stpes=3")


def test_a_section_in_a_section(tmp_path: Path) -> None:
    """Its overrides work, beside the file's values, and a misspelt one names the nearest."""
    text = "training: {steps: 20, profile: {ranks: [1, 0]}}"
    found = load(tmp_path, text, "training.profile.steps=3", "training.profile.start=18").training
    assert found.profile == ProfileConfig(steps=3, start=18, ranks=(1, 0)) and found.steps == 20
    assert load(tmp_path, "training: {steps: 5}").training.profile == ProfileConfig(steps=0)
    assert mistake(tmp_path, text, "training.profile.stpes=3").endswith(
        "unknown key 'training.profile.stpes': did you mean 'steps'?"
    )
    assert mistake(tmp_path, text, "training.profile=3").endswith(
        "training.profile is 3: expected keys and values"
    )
    assert mistake(tmp_path, text, "training.profile.ranks=0").endswith(
        "training.profile.ranks is 0: expected a list"
    )


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("{steps: -1}", "training.profile.steps is -1: it must be a number, 0 or more"),
        ("{start: 0}", "training.profile.start is 0: it must be a number above 0"),
        ("{steps: 3, start: 1001}", "asks for steps 1001 to 1003 and training.steps is 1000: lower"),
        ("{steps: 3, start: 999}", "asks for steps 999 to 1001 and training.steps is 1000: lower"),
        ("{steps: 1, ranks: []}", "training.profile.ranks is []: name at least one rank"),
        ("{steps: 1, ranks: [0, -1]}", "training.profile.ranks is [0, -1]: name at least one rank"),
        ("{steps: 1, ranks: [2, 2]}", "training.profile.ranks is [2, 2]: name at least one rank, each once"),
    ],
)
def test_profiles_that_no_run_can_make(profile: str, words: str, tmp_path: Path) -> None:
    assert words in mistake(tmp_path, "", f"training.profile={profile}")


def test_an_unknown_key_like_no_other_lists_what_there_is(tmp_path: Path) -> None:
    assert mistake(tmp_path, "parallel: {xyz: 1}").endswith(
        "unknown key 'parallel.xyz': known keys: tensor, zero_stage, offload, master, reduce_dtype, overlap, "
        "bucket_size"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('training: {steps: "10"}', "training.steps is '10': expected a whole number"),
        ("training: {steps: 1.5}", "training.steps is 1.5: expected a whole number"),
        ("training: {steps: 1e3}", "training.steps is '1e3': expected a whole number"),
        ("training: {steps: true}", "training.steps is True: expected a whole number"),
        ("training: {steps: }", "training.steps is None: expected a whole number"),
        ("logging: {tensorboard: 1}", "logging.tensorboard is 1: expected true or false"),
        ('logging: {tensorboard: "ja"}', "logging.tensorboard is 'ja': expected true or false"),
        ("training: {steps: 1:30}", "training.steps is '1:30': expected a whole number"),
        ("training: {steps: 0o17}", "training.steps is '0o17': expected a whole number"),
        ("training: {seed: 0b11}", "training.seed is '0b11': expected a whole number"),
        ("training: {seed: 2024-11-30}", "training.seed is '2024-11-30': expected a whole number"),
        ("optimizer: {learning_rate: 1:30.5}", "optimizer.learning_rate is '1:30.5': expected a number"),
        ("training: {output_dir: 08}", "training.output_dir is 8: expected text, in quotes"),
        ("optimizer: {learning_rate: fast}", "optimizer.learning_rate is 'fast': expected a number"),
        ("optimizer: {learning_rate: yes}", "optimizer.learning_rate is 'yes': expected a number"),
        ("optimizer: {learning_rate: [1]}", "optimizer.learning_rate is [1]: expected a number"),
        ("tokenizer: {path: 3}", "tokenizer.path is 3: expected text, in quotes"),
        ("checkpoint: {resume: false}", "checkpoint.resume is False: expected text, in quotes"),
        ("data: {train: {path: a}}", "data.train is {'path': 'a'}: expected a list"),
        ("data: {train: [a.txt]}", "data.train[0] is 'a.txt': expected keys and values"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas has 1 values: expected 2"),
        ("optimizer: {betas: [0.9, x]}", "optimizer.betas[1] is 'x': expected a number"),
        ("model: 3", "model is 3: expected keys and values"),
        ("[1, 2]", "expected sections such as 'model:' at the top level"),
        ("just text", "expected sections such as 'model:' at the top level"),
    ],
)
def test_wrong_types(text: str, words: str, tmp_path: Path) -> None:
    assert mistake(tmp_path, text).endswith(words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.kind=dens", "model.kind is 'dens': choose one of memoryformer, dense"),
        ("model.norm=batchnorm", "model.norm is 'batchnorm': choose one of layernorm, rmsnorm"),
        ("model.score=x", "model.score is 'x': choose one of probability, scaled_probability"),
        ("model.bits=7", "model.bits 7 does not divide model.hidden_size 512"),
        ("model.num_heads=5", "model.num_heads 5 does not divide model.hidden_size 512"),
        ("model.expand_bits=9", "model.bits 8 + model.expand_bits 9 = 17"),
        ("model.expand_bits=-1", "model.bits 8 + model.expand_bits -1 = 7"),
        ("model.num_layers=0", "model.num_layers is 0: it must be at least 1"),
        ("model.temperature=0", "model.temperature is 0.0: it must be a number above 0"),
        ("model.temperature=.nan", "model.temperature is nan: it must be a number above 0"),
        ("model.norm_epsilon=-1e-5", "model.norm_epsilon is -1e-05: it must be a number above 0"),
        ("model.rotary_fraction=1.5", "model.rotary_fraction is 1.5: it must be between 0 and 1"),
        ("training.precision=float16", "training.precision is 'float16': choose one of float32, bfloat16"),
        ("training.recompute=all", "training.recompute is 'all': choose one of none, block"),
        ("training.steps=0", "training.steps is 0: it must be a number above 0"),
        ("training.micro_batch_size=-1", "training.micro_batch_size is -1: it must be a number above 0"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate is inf: it must be a number above 0"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay is -0.1: it must be a number, 0 or more"),
        ("training.average_decay=1", "training.average_decay is 1.0: it must be in [0, 1)"),
        ("optimizer.groups.head.weight_decay=-1", "optimizer.groups.head.weight_decay is -1.0: it must be a"),
        (
            "optimizer.groups.tabels.weight_decay=1",
            "unknown key 'optimizer.groups.tabels': did you mean 'tables'",
        ),
        ("optimizer.groups=2", "optimizer.groups is 2: expected keys and values"),
        ("optimizer.groups.tables=2", "optimizer.groups.tables is 2: expected keys and values"),
        (
            "optimizer.groups.matrices.weight_decay=0.5",
            "optimizer.groups.matrices is set and the model (memoryformer, attention softmax) has none: leave it out",
        ),
        (
            "optimizer={table_learning_rate_multiplier: 2, groups: {tables: {learning_rate_multiplier: 3}}}",
            "table_learning_rate_multiplier is 2 and optimizer.groups.tables.learning_rate_multiplier is 3: keep one",
        ),
        (
            "optimizer.width_rule=mup",
            "optimizer.width_rule is mup and optimizer.base_hidden_size is missing: give",
        ),
        (
            "optimizer.base_hidden_size=64",
            "base_hidden_size is 64 and optimizer.width_rule is none: set it to mup",
        ),
        ("optimizer.width_rule=sp", "optimizer.width_rule is 'sp': choose one of none, mup"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas is [0.9, 1.0]: each must be in [0, 1)"),
        ("logging.alarm_entropy=-1", "logging.alarm_entropy is -1.0: it must be in [0, 1]"),
        ("schedule.minimum_fraction=2", "schedule.minimum_fraction is 2.0: it must be in [0, 1]"),
        ("schedule.warmup_steps=-1", "schedule.warmup_steps is -1: it must be a number, 0 or more"),
        ("parallel.zero_stage=4", "parallel.zero_stage is 4: choose 0, 1, 2 or 3"),
        ("parallel.master=split", "parallel.master is 'split' and training.precision is float32"),
        (
            "schedule.decay_steps=5",
            "schedule.decay_steps is of warmup_stable_decay and schedule.kind is cosine",
        ),
        (
            "schedule={kind: warmup_stable_decay, decay_steps: 10000000}",
            "steps of warm-up and 10000000 of decay",
        ),
        (
            "schedule={kind: warmup_stable_decay, decay_fraction: 1.0}",
            "1000 of decay, and it goes over 1000 steps",
        ),
        ("schedule.decay_steps=0", "schedule.decay_steps is 0: it must be a number above 0"),
        ("schedule.on_change=jump", "schedule.on_change is 'jump': choose one of refuse, follow, rewarm"),
        (
            "schedule={on_change: rewarm, warmup_steps: 0}",
            "schedule.warmup_steps, over which it goes, is 0: raise it",
        ),
        ("schedule.kind=wsd", "choose one of cosine, linear, constant, warmup_stable_decay, inverse_sqrt"),
        ("parallel.master=half", "parallel.master is 'half': choose one of float32, split"),
        ("optimizer.table_exp_avg=row", "table_exp_avg is 'row': choose one of float32, bfloat16, int8"),
        ("optimizer.table_exp_avg_sq=fp8", "choose one of float32, bfloat16, int8, row"),
        ("parallel.tensor=0", "parallel.tensor is 0: it must be a number above 0"),
        ("data.skip_steps=[1.5]", "data.skip_steps[0] is 1.5: expected a whole number or text"),
        (
            "data.skip_steps=[3, 9-7]",
            "data.skip_steps is [3, '9-7']: each must be a step, or the first and the last",
        ),
        ("data.skip_steps=[0]", "data.skip_steps is [0]: each must be a step"),
        ("data.skip_steps=[1-2-3]", "data.skip_steps is ['1-2-3']: each must be a step"),
        ("data.skip_steps=7", "data.skip_steps is 7: expected a list"),
        ("training.z_loss=0.1", "training.z_loss is 0.1: it must be in [0, 0.01]"),
        ("training.skip_nonfinite=-1", "training.skip_nonfinite is -1: it must be a number, 0 or more"),
        ("training.skip_spikes=.nan", "training.skip_spikes is nan: it must be a number, 0 or more"),
        ("data.train=[{path: a, hub: b}]", "data.train[0]: give either 'path'"),
        ("data.validation=[{}]", "data.validation[0]: give either 'path'"),
        ("data.train=[{path: a, name: x}]", "unknown key 'data.train[0].name'"),
        (
            "data.validation=[{path: a}, {path: b, name: '0'}]",
            "data.validation has two sets named '0': give each",
        ),
        ("data.train=[{path: a, weight: 0}]", "data.train[0].weight is 0.0: it must be a number above 0"),
    ],
)
def test_values_that_no_run_can_use(override: str, words: str, tmp_path: Path) -> None:
    assert words in mistake(tmp_path, "", override)


def test_every_validation_set_gets_a_sequence(tmp_path: Path) -> None:
    text = "data: {validation: [{path: a, name: x}, {path: b, name: y}]}"
    assert mistake(tmp_path, text, "training.validation_sequences=1").endswith(
        "training.validation_sequences is 1 and data.validation has 2 sets: raise it, so that each set has one"
    )
    assert load(tmp_path, text, "training.validation_sequences=2").training.validation_sequences == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps", "write it as section.key=value"),
        ("training.steps: 3", "write it as section.key=value"),
        ("=3", "write it as section.key=value"),
        ("training..steps=3", "write it as section.key=value"),
        ("training.steps=[1", "is not valid YAML"),
        ("training.steps=\0", "is not valid YAML"),
        ("training.steps.x=1", "training.steps is not a section; set it as a whole"),
    ],
)
def test_bad_overrides(override: str, words: str, tmp_path: Path) -> None:
    message = mistake(tmp_path, "training: {steps: 3}", override)
    assert message.startswith(f"override {override!r}:") and words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model:\n  bits: 8\n  bits: 4", "line 3 is not valid YAML (key 'bits' stands twice)"),
        ("model: {}\nmodel: {}", "line 2 is not valid YAML (key 'model' stands twice)"),
        ("model: [1", "line 1 is not valid YAML"),
        ("model:\n\tbits: 8", "line 2 is not valid YAML"),
        ("model: {}\n---\nmodel: {}", "line 2 is not valid YAML"),
        ("? [a]\n: b", "line 1 is not valid YAML (a key must be text)"),
        ("model: !!python/name:os.system", "line 1 is not valid YAML"),
        (f"model: {'9' * 5000}", "has a number of too many digits"),
        ("model: \0", "is not valid YAML (unacceptable character #x0000"),
        (b"model: \xff", "not UTF-8 text (invalid start byte at byte 7)"),
        ("model:\n".encode("utf-16"), "not UTF-8 text"),
    ],
)
def test_files_that_are_not_yaml(text: str | bytes, words: str, tmp_path: Path) -> None:
    assert words in mistake(tmp_path, text)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^.*/none\.yaml: no such configuration file$"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r": is a folder; name the YAML file in it$"):
        load_config(tmp_path)
    with pytest.raises(UserError, match=r": cannot be read \(File name too long\)$"):
        load_config("x" * 5000)
