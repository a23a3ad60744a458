"""The grid: resolved configurations, lengths, what is left out, numbers that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.planning.device_memory import estimate_memory
from mf_train.planning.devices import find_device
from mf_train.planning.time import estimate_step
from mf_train.planning.work import model_flops
from mf_train.study.cells import Grid, make_grid
from mf_train.study.run import write_cells
from mf_train.study.study import load_study
from tests.study.studies import finish, make_study, study_file, write_metrics


def grid(folder: Path, axes: dict[str, Any], **other: Any) -> Grid:
    return make_study(folder, axes, **other)[1]


def record(folder: Path, made: Grid) -> None:
    """What `study run` leaves of the cells that it starts."""
    write_cells(load_study(folder / "study.yaml"), made.cells)


def test_cells_are_numbered_and_resolved(tmp_path: Path) -> None:
    made = grid(tmp_path, {"bits": [2, 4], "seed": [0, 1]}, settings={"optimizer.weight_decay": 0.0})
    assert [cell.number for cell in made.cells] == [0, 1, 2, 3] and not made.left_out
    last = made.cells[3]
    assert last.values == {"bits": "4", "seed": "1"}
    assert (last.config.model.bits, last.config.training.seed, last.config.data.seed) == (4, 1, 1)
    assert last.config.optimizer.weight_decay == 0.0 and last.config.training.steps == 4
    assert last.config.training.output_dir == str(tmp_path / "out" / "cell-3")


def test_lengths_become_steps(tmp_path: Path) -> None:
    made = grid(tmp_path, {"tokens": [1000, 5000, 100]})
    assert [cell.config.training.steps for cell in made.cells] == [4, 20]  # 8 sequences of 32 tokens a step
    assert made.cells[1].cost.tokens == 20 * 256
    assert "less than one step of 256 tokens" in made.left_out[0].reason


def test_phases_are_counted_and_stay_at_their_steps(tmp_path: Path) -> None:
    ramp = {"phases": [{"name": "ramp", "start": 3, "training": {"global_batch_size": 16}}]}
    made = grid(tmp_path, {"training.steps": [2, 4]}, settings=ramp)
    assert [cell.cost.tokens for cell in made.cells] == [2 * 256 + 2 * 512]
    assert "phases[0].start is 3" in made.left_out[0].reason
    made = grid(tmp_path, {"tokens": [5000]}, settings=ramp)
    assert "axis tokens sets training.steps, in which phases have their places" in made.left_out[0].reason


def test_flops_are_shared_by_sizes(tmp_path: Path) -> None:
    made = grid(tmp_path, {"size": {"depths": [1, 2, 4], "width": 16, "head_size": 8}, "flops": [3e10]})
    steps = [cell.config.training.steps for cell in made.cells]
    assert steps == sorted(steps, reverse=True) and len(set(steps)) == 3
    assert all(cell.cost.flops == pytest.approx(3e10, rel=0.5 / min(steps)) for cell in made.cells)


def test_tokens_per_parameter(tmp_path: Path) -> None:
    made = grid(tmp_path, {"tokens_per_parameter": [2]})
    cell = made.cells[0]
    assert cell.cost.tokens == pytest.approx(2 * cell.cost.parameters, abs=128)


@pytest.mark.parametrize(
    ("axes", "processes", "reason"),
    [
        ({"bits": [4, 5]}, 1, "model.bits 5 does not divide model.hidden_size 32"),
        ({"training.global_batch_size": [8, 3]}, 4, "training.global_batch_size 3"),
        ({"training.steps": [3, 2]}, 1, "schedule.warmup_steps 2"),
    ],
    ids=["sizes", "processes", "a warm-up longer than the run"],
)
def test_what_cannot_be_run_is_listed(
    axes: dict[str, list[int]], processes: int, reason: str, tmp_path: Path
) -> None:
    made = grid(tmp_path, axes | {"seed": [0, 1]}, processes=processes)
    ((name, (good, bad)),) = axes.items()
    assert [cell.values[name] for cell in made.cells] == [str(good)] * 2
    assert [one.values for one in made.left_out] == [{name: str(bad), "seed": seed} for seed in "01"]
    assert made.left_out[0].reason.startswith(reason)


def test_the_dense_peer_ignores_the_table_s_axes(tmp_path: Path) -> None:
    made = grid(tmp_path, {"kind": ["dense", "memoryformer"], "bits": [2, 4]})
    assert [cell.values["kind"] for cell in made.cells] == ["dense", "memoryformer", "memoryformer"]
    assert made.left_out[0].reason == "the same run as cell 0"


def test_memory_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    axes = {"size": {"depths": [1, 64], "width": 16, "head_size": 16}}
    small, large = grid(tmp_path, axes).cells
    for cell in (small, large):
        assert cell.memory == estimate_memory(cell.config, 1, "cpu").peak
    limit = {"memory_gb": (small.memory + large.memory) / 2e9}
    made = grid(tmp_path, axes, budget=limit)
    assert [cell.number for cell in made.cells] == [0]
    assert "does not fit" in made.left_out[0].reason and "budget.memory_gb is" in made.left_out[0].reason


def test_a_device_s_memory_and_rates_count(tmp_path: Path) -> None:
    measured = tmp_path / "mine.yaml"
    measured.write_text("base: cpu\nmemory: 7.0e+8\ncopy: 2.0e+10\n")
    axes = {"size": {"depths": [1, 64], "width": 16, "head_size": 16}}
    made = grid(tmp_path, axes, budget={"device": str(measured)})
    assert "92% of budget.device mine is 644.0 MB" in made.left_out[0].reason
    (cell,) = made.cells
    step = estimate_step(cell.config, 1, 1, find_device(str(measured)))
    assert cell.seconds == pytest.approx(4 * step.seconds) and cell.seconds > 0
    cuda = grid(tmp_path, axes, budget={"device": "h100"}).cells
    assert all(one.memory > 1e9 for one in cuda), "a GPU's context and buckets"


def test_processes_are_laid_out_on_nodes(tmp_path: Path) -> None:
    axes = {"training.global_batch_size": [64]}
    settings = {"data.logical_streams": 16}

    def seconds(**budget: int) -> float:
        budgets = {"device": "h100", **budget}
        return grid(tmp_path, axes, processes=16, settings=settings, budget=budgets).cells[0].seconds or 0

    default = seconds()
    eight, all_inside, apart = (seconds(processes_per_node=n) for n in (8, 16, 1))
    assert default == eight < apart and all_inside != eight


def test_the_budget_takes_the_cheapest_first(tmp_path: Path) -> None:
    axes = {"training.steps": [40, 10, 20]}
    free = grid(tmp_path, axes, budget={"device": "cpu"})
    cells = {cell.config.training.steps: cell for cell in free.cells}
    made = grid(tmp_path, axes, budget={"flops": cells[10].cost.flops + cells[20].cost.flops + 1})
    assert [cell.config.training.steps for cell in made.cells] == [10, 20]
    assert [cell.number for cell in made.cells] == [1, 2], "the budget does not change a cell's number"
    assert "over the budget" in made.left_out[0].reason and "budget.flops" in made.left_out[0].reason
    # one that is left out costs nothing: where hours decide the order, a cell of more FLOPs may come first
    flops = sorted([cells[10].cost.flops, cells[20].cost.flops, cells[40].cost.flops])
    made = grid(tmp_path, axes, budget={"flops": flops[1] + 1})
    told = [f"{cost:.3g} FLOPs with it" for cost in (flops[0] + flops[1], flops[0] + flops[2])]
    assert [word in left.reason for word, left in zip(told, made.left_out, strict=True)] == [True, True]
    made = grid(tmp_path, axes, budget={"hours": cells[10].seconds * 1.01 / 3600, "device": "cpu"})
    assert [cell.config.training.steps for cell in made.cells] == [10]
    assert all("budget.hours" in one.reason for one in made.left_out)
    none = grid(tmp_path, axes, budget={"flops": 1.0})
    assert not none.cells and len(none.left_out) == 3


def test_what_has_run_stays_and_is_charged_first(tmp_path: Path) -> None:
    axes = {"seed": [0], "training.steps": [4, 8]}
    small, large = grid(tmp_path, axes).cells
    limit = {"flops": small.cost.flops + large.cost.flops + 1}
    before = grid(tmp_path, axes, budget=limit)
    record(tmp_path, before)
    finish(small, 2.0)
    write_metrics(large.folder, {3: 2.0}, {})  # stopped: it goes on
    made = grid(tmp_path, axes | {"seed": [0, 1]}, budget=limit)
    assert [cell.number for cell in made.cells] == [0, 1]
    assert [one.values["seed"] for one in made.left_out] == ["1", "1"]
    for less in ({"flops": 1.0}, {"hours": 1e-12, "device": "cpu"}):
        assert [cell.number for cell in grid(tmp_path, axes, budget=less).cells] == [0, 1]
    room = {"flops": limit["flops"] + small.cost.flops}
    made = grid(tmp_path, axes | {"seed": [0, 1]}, budget=room)
    assert [tuple(cell.values.values()) for cell in made.cells] == [("0", "4"), ("0", "8"), ("1", "4")]


def test_numbers_stay_when_axes_grow(tmp_path: Path) -> None:
    record(tmp_path, grid(tmp_path, {"bits": [4], "seed": [0, 1]}))
    made = grid(tmp_path, {"bits": [2, 4], "seed": [0, 1, 2]})
    numbers = {tuple(cell.values.values()): cell.number for cell in made.cells}
    assert numbers["4", "0"] == 0 and numbers["4", "1"] == 1
    assert sorted(numbers.values()) == list(range(6))
    record(tmp_path, made)
    again = grid(tmp_path, {"seed": [0, 1, 2], "bits": [4, 2]})
    assert {(c.values["bits"], c.values["seed"]): c.number for c in again.cells} == numbers


def test_a_changed_setting_is_another_cell(tmp_path: Path) -> None:
    record(tmp_path, grid(tmp_path, {"seed": [0]}))
    assert grid(tmp_path, {"seed": [0]}, settings={"optimizer.learning_rate": 1e-4}).cells[0].number == 1


def test_a_wrong_base_is_a_mistake(tmp_path: Path) -> None:
    path = study_file(tmp_path, {"seed": [0]})
    (tmp_path / "base.yaml").write_text("model: {bits: 5}\n")
    with pytest.raises(UserError, match=r"base.yaml: model.bits 5"):
        make_grid(load_study(path))
    with pytest.raises(UserError, match="no such configuration file"):
        make_grid(load_study(study_file(tmp_path, {"seed": [0]}, base=str(tmp_path / "none.yaml"))))


def test_flops_of_the_paper_s_tiny_model(tmp_path: Path) -> None:
    """Table 1 has 4.7e9 multiply-adds for a block of 2048 tokens."""
    config = load_config("configs/tiny.yaml")
    blocks = model_flops(config.model) / 6 - config.model.hidden_size * config.model.vocab_size
    assert blocks * 2048 / 6 == pytest.approx(4.7e9, rel=0.01)
