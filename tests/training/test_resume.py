"""What a run goes on from, whatever lies in its folder. Two real processes choose; the checkpoints are made by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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


NEWEST = "step-000000030"


class Situation(NamedTuple):
    """A run's folder with checkpoints of some steps, one of which something was done to, and what is chosen there."""

    chosen: str  # a step, or the beginning of what is refused
    aside: Sequence[str] = ()  # what is renamed, by the ends of the names
    damage: Callable[[Path], object] = lambda checkpoints: None
    steps: tuple[int, ...] = (10, 20, 30)
    resume: str = "auto"  # FOLDER is that of all situations
    started_from: str = "auto"
    verify: bool = True


def flip_weights(*steps: int) -> Callable[[Path], object]:
    return lambda path: [flip(path / f"step-{step:09d}" / WEIGHTS) for step in steps]


def abandon(*steps: int) -> Callable[[Path], object]:
    names = [f"step-{step:09d}" for step in steps]
    return lambda path: [(path / name).rename(path / f"{name}.abandoned") for name in names]


def in_manifest(old: str, new: str) -> Callable[[Path], object]:
    def replace_text(path: Path) -> None:
        text = (path / NEWEST / MANIFEST).read_text()
        assert text.count(old) == 1
        (path / NEWEST / MANIFEST).write_text(text.replace(old, new))

    return replace_text


DAMAGED, BACK = ["30.damaged"], ["20.abandoned", "30.abandoned"]
OTHER, BAD = "FOLDER/other/checkpoints/step-000000500", "FOLDER/bad/checkpoints/step-000000500"
SITUATIONS = {
    "new": Situation("none", steps=()),
    "good": Situation("30"),
    "cut": Situation("20", DAMAGED, lambda path: (path / NEWEST / WEIGHTS).write_bytes(b"123")),
    "lost": Situation("20", DAMAGED, lambda path: (path / NEWEST / WEIGHTS).unlink()),
    "flipped": Situation("20", DAMAGED, flip_weights(30)),
    "flipped-unverified": Situation("30", [], flip_weights(30), verify=False),
    "flipped-state": Situation("20", DAMAGED, lambda path: flip(path / NEWEST / "state.json")),
    "flipped-manifest": Situation("20", DAMAGED, lambda path: flip(path / NEWEST / MANIFEST)),
    "two-bad": Situation("10", ["20.damaged", "30.damaged"], flip_weights(20, 30)),
    "all-bad": Situation(
        "no checkpoint of this run is good", ["10.damaged", "20.damaged", *DAMAGED], flip_weights(10, 20, 30)
    ),
    "own-bad": Situation(
        "weights-1-of-2-part-000", [], flip_weights(30), resume=f"FOLDER/own-bad/checkpoints/{NEWEST}"
    ),
    "abandoned": Situation("no checkpoint of this run is good", ["10.abandoned", *BACK], abandon(10, 20, 30)),
    "to-abandoned": Situation(
        "20",
        BACK,
        abandon(20),
        resume="FOLDER/to-abandoned/checkpoints/step-000000020.abandoned",
    ),
    "format-digit": Situation("20", DAMAGED, in_manifest('"format": 2,', '"format": 3,')),
    "manifest-nested": Situation(
        "20", DAMAGED, lambda path: (path / NEWEST / MANIFEST).write_text("[" * 200_000)
    ),
    "manifest-names": Situation("20", DAMAGED, in_manifest('"state.json"', '"../state.json"')),
    "format": Situation(
        "step-000000030/manifest.json: format 1, this version reads formats 2 and 3",
        [],
        lambda path: (path / NEWEST / MANIFEST).write_text('{"format": 1}'),
    ),
    "from-other": Situation("500", steps=(), resume=OTHER),
    "from-other-run": Situation("500", steps=(), resume="FOLDER/other"),
    "from-bad": Situation(
        "step-000000500: weights-1-of-2-part-000.safetensors: its checksum", steps=(), resume=BAD
    ),
    "again-from-other": Situation("30", started_from=OTHER, resume=OTHER),
    "again-and-gone": Situation("30", started_from="/no/such", resume="/no/such"),
    "other-refused": Situation("holds checkpoints up to step-000000030 of a run that did not", resume=OTHER),
    "back": Situation("10", BACK, resume="FOLDER/back/checkpoints/step-000000010"),
}


def prepare(folder: Path) -> dict[str, Config]:
    original = folder / "original"
    write_checkpoint(original, SMALL, random_weights(SMALL, 0), 2)
    for name in ("other", "bad"):
        make_run(folder / name, original, (500,))
    flip_weights(500)(folder / "bad" / "checkpoints")
    configs = {}
    for name, case in SITUATIONS.items():
        resume, started_from = (text.replace("FOLDER", str(folder)) for text in case[4:6])
        case.damage(make_run(folder / name, original, case.steps, started_from))
        configs[name] = config_of(folder / name, resume, case.verify)
    return configs


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


@pytest.mark.parametrize("name", SITUATIONS)
def test_what_is_chosen(folder: Path, ranks: list[dict[str, str]], name: str) -> None:
    case, (first, second) = SITUATIONS[name], (found[name] for found in ranks)
    if case.chosen.isdigit() or case.chosen == "none":
        assert first == second == case.chosen
    else:
        assert first.startswith("UserError: ") and case.chosen in first and second.startswith("PeerError")
    paths = {path.name for path in (folder / name / "checkpoints").glob("step-*")}
    assert sorted(path for path in paths if "." in path) == [f"step-0000000{end}" for end in case.aside]
    left = {path.name for path in list_checkpoints(folder / name / "checkpoints")}
    assert left == {path for path in paths if "." not in path}
    if left and first == second:
        assert (folder / name / "checkpoints" / "latest").read_text() == f"{max(left)}\n"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("all-bad", "checkpoint.resume=PATH"),
        ("from-bad", "choose another"),
        ("other-refused", "leave checkpoint.resume out"),
    ],
)
def test_what_is_refused_has_a_remedy(ranks: list[dict[str, str]], name: str, remedy: str) -> None:
    assert remedy in ranks[0][name]


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
