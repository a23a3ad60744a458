"""A run whose data, batch, rows and schedule change at two borders: it goes on from anywhere as if never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mf_train.checkpoint.read import CheckpointReader, stream_state_before
from mf_train.config.loading import parse_config
from mf_train.config.phases import phase_at
from mf_train.config.schedule import Rewarm
from mf_train.data.show import inspect_data
from mf_train.data.tokenizer import Tokenizer
from mf_train.errors import UserError
from mf_train.standalone.conversion.convert import convert, open_checkpoint
from mf_train.training.folder import check_same_run, find_rewarm
from tests.standalone.checkpoints import flip
from tests.training.runs import (
    TOKENIZER,
    complaints,
    read_metrics,
    small_config,
    train,
    write_text,
)

pytestmark = pytest.mark.distributed

SAME = ("step", "phase", "tokens", "loss", "grad_norm", "learning_rate", "batch_digest", "epochs")
RAMP, ANNEAL = 4, 8  # the last steps before these phases
STEPS = 11


def phased(folder: Path) -> dict[str, Any]:
    """The texts are beside the run's folder."""
    tree = small_config(folder, folder.parent / "text.jsonl")
    added = [{"path": str(folder.parent / name)} for name in ("text.jsonl", "added.jsonl")]
    tree["schedule"] = {"kind": "cosine", "warmup_steps": 2}
    tree["training"] |= {"steps": STEPS, "validation_interval": 6, "skip_spikes": 6}
    tree["checkpoint"] = {"interval": 2, "keep": 0}
    tree["phases"] = [
        {
            "name": "ramp",
            "start": RAMP + 1,
            "training": {"global_batch_size": 12, "micro_batch_size": 3},
            "optimizer": {"betas": [0.9, 0.99]},
        },
        {
            "name": "anneal",
            "start": ANNEAL + 1,
            "data": {"train": added},
            "model": {"sequence_length": 48},
            "schedule": {"kind": "linear", "warmup_steps": 0, "minimum_fraction": 0},
            "optimizer": {"learning_rate": 1e-3},
        },
    ]
    return tree


def numbers(folder: Path) -> list[dict[str, Any]]:
    return [{key: record[key] for key in SAME} for record in read_metrics(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not stopped."""
    folder = tmp_path_factory.mktemp("phases") / "run"
    write_text(folder.parent / "text.jsonl")
    write_text(folder.parent / "added.jsonl", 15)
    done = train(phased(folder))
    assert (
        "phase 'anneal': steps 9 to 11; learning rate 3e-05 to 0.0006667, sequences a step 12 to 12, tokens a sequence "
        "32 to 48; changed: model.sequence_length, data.train, optimizer.learning_rate, schedule.kind, "
    ) in done.stdout
    return folder


def go_on(whole: Path, name: str, step: int, tree: dict[str, Any], processes: int = 1) -> tuple[Path, str]:
    """Another run from the whole run's checkpoint of a step, as if that had been killed; its folder and its lines."""
    folder = whole.parent / name
    shutil.copytree(whole, folder)
    tree["training"]["output_dir"] = str(folder)
    for path in (folder / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return folder, train(tree, processes=processes).stdout


def test_metrics_name_the_phase_and_count_on(whole: Path) -> None:
    records = read_metrics(whole)
    assert [each["phase"] for each in records] == ["main"] * 4 + ["ramp"] * 4 + ["anneal"] * 3
    sizes = [8 * 32] * 4 + [12 * 32] * 4 + [12 * 48] * 3
    assert [each["tokens"] for each in records] == [sum(sizes[: step + 1]) for step in range(STEPS)]
    assert [step + 1 for step, each in enumerate(records) if "validation_loss" in each] == [4, 6, 8, 11]
    assert not any("resumed_after" in each for each in records)
    rates = [each["learning_rate"] for each in records]
    assert rates[8:] == pytest.approx([1e-3 * 2 / 3, 1e-3 / 3, 0]) and max(rates[:4]) == 3e-3
    # the text of the first phases is read on, and what was added begins
    epochs = [each["epochs"] for each in records]
    assert epochs[8][0] >= epochs[7][0] >= epochs[3][0] > 0 and epochs[8][1] < 0.2
    state = json.loads((whole / "checkpoints" / "step-000000010" / "state.json").read_text())
    assert state["step"] == 10 and state["stream"]["step"] == 2 and len(state["bad_steps"]["losses"]) == 2


SLOW = pytest.mark.slow


@pytest.mark.parametrize("step", [RAMP, pytest.param(RAMP + 2, marks=SLOW), pytest.param(ANNEAL, marks=SLOW)])
def test_the_same_shape_goes_on_to_the_last_bit(whole: Path, step: int) -> None:
    folder, said = go_on(whole, f"bits-{step}", step, phased(whole))
    assert f"resumed after step {step} from" in said
    assert numbers(folder) == numbers(whole)
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        name = f"checkpoints/step-{STEPS:09d}/{kind}-0-of-1-part-000.safetensors"
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("step", "processes", "parallel"),
    [
        (RAMP + 2, 2, {"tensor": 2, "zero_stage": 1}),
        pytest.param(RAMP, 3, {"tensor": 1, "zero_stage": 3}, marks=SLOW),
        pytest.param(ANNEAL, 4, {"tensor": 2, "zero_stage": 2}, marks=SLOW),
        pytest.param(RAMP, 2, {"tensor": 1, "zero_stage": 0}, marks=SLOW),
    ],
)
def test_another_shape_goes_on_with_the_same_batches(
    whole: Path, step: int, processes: int, parallel: dict[str, int]
) -> None:
    tree = phased(whole) | {"parallel": parallel}
    folder, _ = go_on(whole, f"shape-{processes}-{step}", step, tree, processes)
    for there, here in zip(numbers(whole), numbers(folder), strict=True):
        for key in ("loss", "grad_norm"):
            assert here.pop(key) == pytest.approx(there.pop(key), rel=2e-5)
        assert here == there


@SLOW
@pytest.mark.parametrize("damaged", [[10], [ANNEAL, 10]])
def test_a_damaged_checkpoint_goes_back_over_a_border(whole: Path, damaged: list[int]) -> None:
    """To a border whose phase was looked at after its second batch, and to a phase that was not looked at."""
    copy = whole.parent / f"damaged-{len(damaged)}"
    shutil.copytree(whole, copy)
    for step in damaged:
        flip(copy / "checkpoints" / f"step-{step:09d}" / "weights-0-of-1-part-000.safetensors")
    folder, said = go_on(copy, f"{copy.name}-on", 10, phased(whole))
    assert f"resumed after step {min(damaged) - 2} from" in said
    assert numbers(folder) == numbers(whole)


@SLOW
def test_a_run_that_is_done_gets_another_phase(whole: Path) -> None:
    """As if it had had it from the start: the first schedule ends where the next begins, and ended there before."""
    tree = phased(whole)
    tree["training"]["output_dir"] = str(whole.parent / "done")
    train(tree | {"training": tree["training"] | {"steps": ANNEAL}, "phases": tree["phases"][:1]})
    said = train(tree).stdout
    assert "phase 'anneal': steps 9 to 11; learning rate 3e-05 to 0.0006667" in said and "jumps" not in said
    assert numbers(whole.parent / "done") == numbers(whole)


@pytest.mark.parametrize("step", [RAMP, RAMP + 1, ANNEAL + 2, STEPS + 2])
def test_data_inspect_shows_the_batch_of_a_phase(whole: Path, step: int) -> None:
    """From the checkpoint before, and without one through the phases before."""
    config = parse_config(phased(whole), "here")
    shown = [list(inspect_data(config, step, saved)) for saved in (stream_state_before(whole, step), None)]
    assert shown[0] == shown[1]
    assert f"phase {phase_at(config, step).name!r}: steps " in shown[0][0]
    if step <= STEPS:
        assert any(line.endswith(read_metrics(whole)[step - 1]["batch_digest"]) for line in shown[0])


def test_a_converted_model_has_the_rows_of_the_last_phase(whole: Path, tmp_path: Path) -> None:
    lines = list(convert(whole, tmp_path / "model"))
    assert any("largest logit difference from the trainer is 0" in line for line in lines)
    made = json.loads((tmp_path / "model" / "config.json").read_text())
    assert made["max_position_embeddings"] == 48
    _, config = open_checkpoint(whole / "checkpoints" / f"step-{ANNEAL:09d}")
    assert config.model.sequence_length == 32 and config.training.global_batch_size == 12


def test_what_a_checkpoint_of_a_run_with_phases_resumes_as(whole: Path) -> None:
    tokenizer = Tokenizer(TOKENIZER)

    def resume(step: int, tree: dict[str, Any]) -> object:
        reader, config = (
            CheckpointReader(whole / "checkpoints" / f"step-{step:09d}"),
            parse_config(tree, "here"),
        )
        check_same_run(config, tokenizer, reader)
        return find_rewarm(config, reader)

    tree = phased(whole)
    main, (ramp, anneal) = tree | {"phases": []}, tree["phases"]
    for step in (RAMP, RAMP + 2, ANNEAL, ANNEAL + 2):
        assert resume(step, tree) is None
    for step, phases in (
        (RAMP + 2, []),  # dropped
        (RAMP + 2, [anneal]),
        (RAMP + 2, [ramp | {"start": RAMP}]),  # moved
        (RAMP + 2, [ramp, anneal | {"start": RAMP + 2}]),  # behind what was trained
        (ANNEAL + 2, [ramp]),
    ):
        with pytest.raises(
            UserError, match=r"phases began at \[.*\] there and at \[.*\] in this configuration: leave"
        ):
            resume(step, main | {"phases": phases})
    # what comes may change, but not the rate on the way to it
    later = {"name": "later", "start": RAMP + 3, "training": {"z_loss": 1e-4}}
    resume(RAMP + 2, main | {"phases": [ramp, later, anneal]})
    resume(ANNEAL, main | {"phases": [ramp, anneal | {"schedule": {"kind": "constant"}}]})
    with pytest.raises(UserError, match="the learning rate of step 7 would be"):
        resume(RAMP + 2, main | {"phases": [ramp]})
    with pytest.raises(UserError, match="the learning rate of step 11 would be"):
        resume(ANNEAL + 2, main | {"phases": [ramp, anneal | {"schedule": {"kind": "constant"}}]})
    follow = {"schedule": tree["schedule"] | {"on_change": "rewarm"}}
    assert resume(RAMP + 2, main | follow | {"phases": [ramp]}) == Rewarm(
        RAMP + 2, pytest.approx(3e-3 * (0.01 + 0.99 / 4))
    )


def test_a_mistake_of_the_last_phase_shows_before_the_first_step(whole: Path, tmp_path: Path) -> None:
    tree = phased(whole)
    tree["training"]["output_dir"] = str(tmp_path / "run")
    tree["phases"][1]["data"] = {"train": [{"path": str(tmp_path / "none.jsonl")}]}
    assert "phase 'anneal': data.train[0]" in complaints(train(tree, expect=2))[0]
    assert not (tmp_path / "run").exists()
    tree["phases"][1] = {"name": "small", "start": 9, "training": {"global_batch_size": 1}}
    done = train(tree, processes=2, expect=2)
    assert "phase 'small': training.global_batch_size 1 leaves some of 2 data" in complaints(done)[0]
