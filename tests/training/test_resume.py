"""What a run goes on from, whatever lies in its folder. Two real processes choose; the checkpoints are made by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mf_train.checkpoint.fence import claim
from mf_train.checkpoint.layout import CONFIG, MANIFEST, Manifest, list_checkpoints, part_name
from mf_train.checkpoint.read import CheckpointReader
from mf_train.config import CheckpointConfig, Config, ModelConfig, TrainingConfig
from mf_train.config.loading import config_to_tree
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.tokenizer_training import train_tokenizer
from mf_train.errors import PeerError, TrainingError, UserError
from mf_train.parallel.groups import start_processes, stop_processes
from mf_train.parallel.processes import find_process
from mf_train.training.folder import check_same_run
from mf_train.training.resume import _Candidates, choose_checkpoint, look_ahead
from tests.distributed import run_distributed
from tests.standalone.checkpoints import flip, random_weights, records, write_checkpoint
from tests.training.runs import TOKENIZER, write_text

pytestmark = pytest.mark.distributed
SMALL = ModelConfig(hidden_size=16, num_layers=1, num_heads=2, bits=2, vocab_size=4096, sequence_length=8)
WEIGHTS = part_name("master", 1, 2, 0)


def config_of(run: Path, resume: str = "auto", verify: bool = True) -> Config:
    checkpoint = CheckpointConfig(resume=resume, verify=verify)
    return Config(model=SMALL, checkpoint=checkpoint, training=TrainingConfig(output_dir=str(run)))


def make_run(run: Path, original: Path, steps: tuple[int, ...], resume: str = "auto") -> Path:
    """A run's folder with a checkpoint of each step, as a run with `resume` would have written them."""
    (run / "checkpoints").mkdir(parents=True)
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:09d}"
        shutil.copytree(original, folder)
        (folder / CONFIG).write_text(yaml.safe_dump(config_to_tree(config_of(run, resume))))
        seal(folder, step)
    return run / "checkpoints"


def seal(folder: Path, step: int) -> None:
    """Bring the manifest up to the files."""
    manifest = Manifest.from_json((folder / MANIFEST).read_text())
    (folder / MANIFEST).unlink()
    new = Manifest(
        manifest.format, step, 2, manifest.kinds, manifest.parameters, manifest.parts, records(folder)
    )
    (folder / MANIFEST).write_text(new.to_json())


def replace_text(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))


def prepare(folder: Path) -> dict[str, Config]:
    original = folder / "original"
    write_checkpoint(original, SMALL, random_weights(SMALL, 0), 2)
    cases = {}

    def case(
        name: str, damage: Callable[[Path], Any], steps: tuple[int, ...] = (10, 20, 30), **settings: Any
    ) -> Path:
        run = folder / name
        checkpoints = make_run(run, original, steps, settings.pop("started_from", "auto"))
        damage(checkpoints)
        cases[name] = config_of(run, **settings)
        return checkpoints

    newest = "step-000000030"
    case("new", lambda _: None, steps=())
    case("good", lambda _: None)
    case("cut", lambda path: (path / newest / WEIGHTS).write_bytes(b"123"))
    case("lost", lambda path: (path / newest / WEIGHTS).unlink())
    case("flipped", lambda path: flip(path / newest / WEIGHTS))
    case("flipped-unverified", lambda path: flip(path / newest / WEIGHTS), verify=False)
    case("flipped-state", lambda path: flip(path / newest / "state.json"))
    case("flipped-manifest", lambda path: flip(path / newest / MANIFEST))
    case("two-bad", lambda path: [flip(path / f"step-0000000{n}0" / WEIGHTS) for n in (2, 3)])
    case("all-bad", lambda path: [flip(path / f"step-0000000{n}0" / WEIGHTS) for n in (1, 2, 3)])
    case(
        "own-bad",
        lambda path: flip(path / newest / WEIGHTS),
        resume=str(folder / "own-bad/checkpoints" / newest),
    )
    case(
        "abandoned",
        lambda path: [
            (path / f"step-0000000{n}0").rename(path / f"step-0000000{n}0.abandoned") for n in (1, 2, 3)
        ],
    )
    case(
        "to-abandoned",
        lambda path: (path / "step-000000020").rename(path / "step-000000020.abandoned"),
        resume=str(folder / "to-abandoned/checkpoints/step-000000020.abandoned"),
    )
    digit = '"format": 2,'
    case("format-digit", lambda path: replace_text(path / newest / MANIFEST, digit, '"format": 3,'))
    case("manifest-nested", lambda path: (path / newest / MANIFEST).write_text("[" * 200_000))
    case(
        "manifest-names",
        lambda path: replace_text(path / newest / MANIFEST, '"state.json"', '"../state.json"'),
    )
    case("format", lambda path: (path / newest / MANIFEST).write_text('{"format": 1}'))

    other = make_run(folder / "other", original, (500,)) / "step-000000500"
    bad = make_run(folder / "bad", original, (500,)) / "step-000000500"
    flip(bad / WEIGHTS)
    case("from-other", lambda _: None, steps=(), resume=str(other))
    case("from-other-run", lambda _: None, steps=(), resume=str(folder / "other"))
    case("from-bad", lambda _: None, steps=(), resume=str(bad))
    case("again-from-other", lambda _: None, started_from=str(other), resume=str(other))
    case("again-and-gone", lambda _: None, started_from="/no/such", resume="/no/such")
    case("other-refused", lambda _: None, resume=str(other))
    case("back", lambda _: None, resume=str(folder / "back" / "checkpoints" / "step-000000010"))
    return cases


def choose(rank: int, world_size: int, cases: dict[str, Config]) -> dict[str, str]:
    start_processes(find_process(), torch.device("cpu"), 60)
    found = {}
    for name, config in cases.items():
        try:
            chosen = choose_checkpoint(config, torch.device("cpu"), lambda: False, lambda: None)
            assert chosen is not None
            chosen[0].check()
            reader = chosen[1]
            found[name] = "none" if reader is None else str(reader.manifest.step)
            if reader is not None:
                assert reader.state()["tokens"] == 700 and reader.read("embedding.weight").any()
        except (UserError, PeerError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    stop_processes()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, str]]:
    return run_distributed(choose, 2, prepare(folder))


@pytest.mark.parametrize(
    ("name", "chosen", "set_aside"),
    [
        ("new", "none", []),
        ("good", "30", []),
        ("cut", "20", ["step-000000030.damaged"]),
        ("lost", "20", ["step-000000030.damaged"]),
        ("flipped", "20", ["step-000000030.damaged"]),
        ("flipped-unverified", "30", []),
        ("flipped-state", "20", ["step-000000030.damaged"]),
        ("flipped-manifest", "20", ["step-000000030.damaged"]),
        ("format-digit", "20", ["step-000000030.damaged"]),
        ("manifest-nested", "20", ["step-000000030.damaged"]),
        ("manifest-names", "20", ["step-000000030.damaged"]),
        ("to-abandoned", "20", ["step-000000020.abandoned", "step-000000030.abandoned"]),
        ("two-bad", "10", ["step-000000020.damaged", "step-000000030.damaged"]),
        ("from-other", "500", []),
        ("from-other-run", "500", []),
        ("again-from-other", "30", []),
        ("again-and-gone", "30", []),
        ("back", "10", ["step-000000020.abandoned", "step-000000030.abandoned"]),
    ],
)
def test_what_is_chosen(
    folder: Path, ranks: list[dict[str, str]], name: str, chosen: str, set_aside: list[str]
) -> None:
    assert [found[name] for found in ranks] == [chosen, chosen]
    paths = {path.name for path in (folder / name / "checkpoints").glob("step-*")}
    assert sorted(path for path in paths if "." in path) == set_aside
    left = {path.name for path in list_checkpoints(folder / name / "checkpoints")}
    assert left == {path for path in paths if "." not in path}
    if left:
        assert (folder / name / "checkpoints" / "latest").read_text() == f"{max(left)}\n"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "all-bad",
            ["no checkpoint of this run is good", "step-000000010.damaged", "checkpoint.resume=PATH"],
        ),
        ("format", ["step-000000030/manifest.json: format 1", "reads format 2"]),
        ("from-bad", ["step-000000500: weights-1-of-2-part-000.safetensors: its checksum", "choose another"]),
        (
            "other-refused",
            ["up to step-000000030 of a run that did not start from", "leave checkpoint.resume out"],
        ),
    ],
)
def test_what_is_refused(folder: Path, ranks: list[dict[str, str]], name: str, words: list[str]) -> None:
    first, second = (found[name] for found in ranks)
    assert first.startswith("UserError: ") and all(word in first for word in words), first
    assert second.startswith("PeerError")


def test_a_run_whose_checkpoints_were_all_bad_does_not_begin_anew_unasked(
    folder: Path, ranks: list[dict[str, str]]
) -> None:
    again = run_distributed(choose_once, 1, config_of(folder / "all-bad"))
    assert again == [ranks[0]["all-bad"].replace("UserError: ", "")]
    assert not list_checkpoints(folder / "all-bad" / "checkpoints")


def choose_once(rank: int, world_size: int, config: Config) -> str:
    start_processes(find_process(), torch.device("cpu"), 60)
    with pytest.raises(UserError) as error:
        choose_checkpoint(config, torch.device("cpu"), lambda: False, lambda: None)
    return str(error.value)


def test_a_start_that_was_overtaken_renames_nothing(folder: Path, tmp_path: Path) -> None:
    checkpoints = make_run(tmp_path / "run", folder / "original", (10, 20))
    back = config_of(tmp_path / "run", resume=str(checkpoints / "step-000000010"))
    for config, damage in ((back, ""), (config_of(tmp_path / "run"), "weights: damaged")):
        candidates = _Candidates(config, claim(checkpoints))
        path = candidates.propose()
        claim(checkpoints)
        assert path is not None
        with pytest.raises(TrainingError, match="newer start"):
            candidates.judge(path, damage)
    assert [left.name for left in list_checkpoints(checkpoints)] == ["step-000000010", "step-000000020"]


def test_looking_ahead_changes_nothing(folder: Path, tmp_path: Path) -> None:
    checkpoints = make_run(tmp_path / "run", folder / "original", (10, 20))
    before = sorted(checkpoints.rglob("*"))
    seen = []

    def refuse(reader: CheckpointReader) -> None:
        seen.append(reader.manifest.step)
        raise UserError("of another run")

    with pytest.raises(UserError, match="of another run"):
        look_ahead(config_of(tmp_path / "run"), refuse)
    flip(checkpoints / "step-000000020" / "state.json")
    look_ahead(config_of(tmp_path / "run"), refuse)  # damaged: no reason to refuse
    look_ahead(config_of(tmp_path / "new"), refuse)
    flip(checkpoints / "step-000000010" / "tokenizer.model")
    shutil.rmtree(checkpoints / "step-000000020")
    before = sorted(checkpoints.rglob("*"))
    assert look_ahead(config_of(tmp_path / "run"), refuse) == 0
    assert seen == [20] and sorted(checkpoints.rglob("*")) == before


def test_a_checkpoint_of_another_model_or_tokenizer(folder: Path, tmp_path: Path) -> None:
    reader = CheckpointReader(folder / "original")
    tokenizer = Tokenizer(TOKENIZER)
    config = config_of(tmp_path)
    check_same_run(config, tokenizer, reader)
    check_same_run(replace(config, model=replace(SMALL, sequence_length=16)), tokenizer, reader)
    for key, value in (("temperature", 2.0), ("num_heads", 4), ("score", "scaled_probability")):
        with pytest.raises(
            UserError, match=rf"original: of another model \(model.{key} is .* there and {value} here"
        ):
            check_same_run(replace(config, model=replace(SMALL, **{key: value})), tokenizer, reader)
    other = train_other_tokenizer(tmp_path)
    with pytest.raises(
        UserError, match=r"original: of another tokenizer; set tokenizer.path=.*tokenizer\.model"
    ):
        check_same_run(config, other, reader)


def train_other_tokenizer(folder: Path) -> Tokenizer:
    text = write_text(folder / "text.jsonl", 40)
    train_tokenizer([str(text)], 300, folder / "tokenizer")
    return Tokenizer(folder / "tokenizer")
