import argparse
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mf_train.cli import main
from mf_train.commands import CommandParser
from mf_train.config import Config, ScheduleConfig, TrainingConfig
from mf_train.config.loading import load_config, parse_config
from mf_train.config.phases import phase_at, phases_of
from mf_train.config.schedule import learning_rate, rate_of
from mf_train.config.sections import decay_steps, warmup_steps
from mf_train.errors import UserError
from mf_train.launch.arguments import add_launch
from mf_train.launch.limits import check_job
from mf_train.launch.options import JobOptions
from mf_train.planning.device_memory import peak_bytes
from mf_train.planning.devices import find_device
from mf_train.planning.plan import choose, frontier, lighten, make_layout, search
from mf_train.planning.scaling import rate_lines, scaling, schedule_points
from mf_train.planning.time import estimate_step
from mf_train.planning.work import model_flops, step_tokens

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BASE, H100 = load_config(CONFIGS / "base.yaml"), find_device("h100")


def test_a_slower_part_makes_a_slower_step() -> None:
    config, device = BASE, H100
    step = estimate_step(config, 4, 8, device)
    for name in ("gather", "copy"):
        slow = replace(device, **{name: getattr(device, name) / 10})
        assert estimate_step(config, 4, 8, slow).seconds > step.seconds
    slow = replace(device, between=replace(device.between, bandwidth=1e9))
    assert estimate_step(config, 4, 8, slow).seconds > step.seconds
    assert estimate_step(config, 1, 8, slow).seconds == estimate_step(config, 1, 8, device).seconds


def test_the_best_layout_fits_is_quick_and_leaves_room() -> None:
    layouts = search(BASE, 1, 8, H100)
    fitting = [layout for layout in layouts if layout.fits]
    assert fitting and len(fitting) < len(layouts)
    assert layouts[0].time.seconds == min(layout.time.seconds for layout in fitting)
    best = choose(layouts)
    assert best is not None and best.fits and best.time.seconds <= 1.05 * layouts[0].time.seconds
    smaller = [layout for layout in fitting if layout.memory.peak < best.memory.peak]
    assert all(layout.time.seconds > 1.05 * layouts[0].time.seconds for layout in smaller)
    assert choose(search(BASE, 1, 8, replace(H100, memory=1e9))) is None


def test_what_keeps_the_results_is_searched_in_both_directions() -> None:
    """What the configuration says of it bounds nothing, and no layout changes anything else."""
    one = load_config(CONFIGS / "base.yaml", ["parallel.tensor=1"])
    far = ("training.recompute=block", "parallel.master=split", "parallel.offload=optimizer")
    other = load_config(CONFIGS / "base.yaml", ["parallel.tensor=1", *far])
    layouts = [layout.config for layout in search(one, 1, 2, H100)]
    assert layouts == [layout.config for layout in search(other, 1, 2, H100)]
    found = {(each.training.recompute, each.parallel.master, each.parallel.offload) for each in layouts}
    assert len(found) == 8
    assert not any(each.parallel.master == "split" and each.parallel.zero_stage == 3 for each in layouts)
    assert {replace(each, training=one.training, parallel=one.parallel) == one for each in layouts} == {True}
    plain = replace(one, training=replace(one.training, precision="float32"))
    assert {each.config.parallel.master for each in search(plain, 1, 2, H100)} == {"float32"}


def test_the_host_takes_what_no_layout_as_quick_has_room_for() -> None:
    """Offload is chosen where nothing without it is within 5 % of the quickest, however little that needs."""
    one = load_config(CONFIGS / "base.yaml", ["parallel.tensor=1"])
    for memory in (60e9, 150e9, 300e9):
        device = replace(H100, memory=memory)
        layouts = search(one, 1, 1, device)
        best = choose(layouts)
        fitting = [layout for layout in layouts if layout.memory.peak <= 0.92 * memory]
        quickest = min(layout.time.seconds for layout in fitting)
        without = [layout for layout in fitting if layout.config.parallel.offload == "none"]
        near = [layout for layout in without if layout.time.seconds <= 1.05 * quickest]
        assert best is not None and (best.config.parallel.offload == "optimizer") == (not near)
        assert bool(near) == (memory > 100e9)


def test_the_table_has_what_no_other_layout_beats() -> None:
    layouts = search(BASE, 1, 8, H100)
    shown = frontier(layouts)
    pairs = [(layout.time.seconds, layout.memory.peak) for layout in layouts]
    best = {
        pair for pair in pairs if not any(o != pair and o[0] <= pair[0] and o[1] <= pair[1] for o in pairs)
    }
    assert sorted((layout.time.seconds, layout.memory.peak) for layout in shown) == sorted(best)
    assert shown[0].time.seconds == layouts[0].time.seconds and 3 < len(shown) < len(layouts) / 10


LIGHT = [
    # what is chosen, and what is switched on one after the other
    (
        ("float32", "float32"),
        [
            *(("table_exp_avg", "bfloat16"), ("table_exp_avg_sq", "bfloat16")),
            *(("table_exp_avg", "int8"), ("table_exp_avg_sq", "int8"), ("table_exp_avg_sq", "row")),
        ],
    ),
    (
        ("float32", "int8"),
        [("table_exp_avg", "bfloat16"), ("table_exp_avg", "int8"), ("table_exp_avg_sq", "row")],
    ),
    (
        ("bfloat16", "float32"),
        [
            *(("table_exp_avg_sq", "bfloat16"), ("table_exp_avg_sq", "int8")),
            *(("table_exp_avg_sq", "row"), ("table_exp_avg", "int8")),
        ],
    ),
    (("int8", "bfloat16"), [("table_exp_avg_sq", "int8"), ("table_exp_avg_sq", "row")]),
    (("int8", "row"), []),
]


@pytest.mark.parametrize(("held", "steps"), LIGHT, ids=lambda value: "-".join(map(str, value))[:30])
def test_moments_are_changed_one_by_one_and_chosen_ones_last(
    held: tuple[str, str], steps: list[tuple[str, str]]
) -> None:
    """A memory between the least that any layout needs before a step and after it asks for the steps up to it."""
    chosen = [f"optimizer.table_exp_avg={held[0]}", f"optimizer.table_exp_avg_sq={held[1]}"]
    config = load_config(CONFIGS / "base.yaml", ["parallel.tensor=1", "parallel.offload=none", *chosen])
    least, changed = [smallest(config)], {}
    for key, kind in steps:
        changed[f"optimizer.{key}"] = kind
        lighter = load_config(
            CONFIGS / "base.yaml",
            ["parallel.tensor=1", *chosen, *(f"{key}={kind}" for key, kind in changed.items())],
        )
        least.append(smallest(lighter))
        memory = (least[-1] + least[-2]) / 2 / 0.92
        found = lighten(config, 1, 1, replace(H100, memory=memory))
        assert found is not None and found.keys == changed and found.layout.fits
        assert found.layout.config.optimizer == lighter.optimizer
    assert least == sorted(least, reverse=True)
    assert lighten(config, 1, 1, replace(H100, memory=0.99 * least[-1] / 0.92)) is None


def smallest(config: Config) -> float:
    """The least that a layout without offload needs, bytes."""
    layouts = search(config, 1, 1, H100)
    return min(layout.memory.peak for layout in layouts if layout.config.parallel.offload == "none")


def test_a_batch_of_no_small_divisors_ends() -> None:
    config = load_config(CONFIGS / "tiny.yaml", ["training.global_batch_size=1000000007"])
    assert search(config, 1, 1, H100)[0].config.training.micro_batch_size == 1


def test_tensor_parallel_groups_stay_inside_a_node() -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor"):
        make_layout(BASE, 4, 4, H100)


def test_scaling_keeps_or_grows_the_batch() -> None:
    curves = scaling(BASE, 4, 8, H100)
    assert [point["devices"] for point in curves["weak"]] == [8, 64, 512, 4096]
    assert {point["global_batch_size"] for point in curves["strong"]} == {1024}
    assert curves["weak"][-1]["global_batch_size"] == 512 * 256  # 1024 sequences on 4 data-parallel ranks
    seconds = [point["step_seconds"] for point in curves["strong"]]
    assert seconds == sorted(seconds, reverse=True)
    assert [point["micro_batch_size"] for point in curves["strong"]] == [32, 32, 16, 2]


def test_a_point_that_cannot_work_says_so() -> None:
    """Of 60 sequences there are enough for 1 and 8 data-parallel ranks, not for 64 or 512; nodes of 5 are not whole."""
    config = load_config(CONFIGS / "base.yaml", ["training.global_batch_size=60"])
    strong = scaling(config, 1, 8, H100)["strong"]
    assert ["refused" in point for point in strong] == [False, False, True, True]
    assert "64 data-parallel ranks" in strong[2]["refused"]
    assert all("refused" in point for point in scaling(config, 1, 5, H100)["weak"])


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, captured.out, captured.err


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(CONFIGS / "base.yaml"), "--nodes", "4", "--json", "--cost-per-hour", "2"]
    code, out, _ = run_plan(capsys, *given)
    found = json.loads(out)
    best = found["best"]
    assert code == 0 and best["fits"] and found["configured"]["tensor"] == 8
    assert sum(best["seconds"].values()) == pytest.approx(best["step_seconds"])
    assert best["device_hours"] == pytest.approx(143000 * best["step_seconds"] * 32 / 3600)
    assert best["cost"] == 2 * best["device_hours"]
    assert found["model"]["checkpoint_bytes"] == 12 * found["model"]["parameters"]
    assert found["model"]["tokens"] == 143000 * 1024 * 2048


def test_the_launch_line_is_one_that_launch_takes(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(CONFIGS / "base.yaml")
    overrides = ("training.steps=9", "training.micro_batch_size=1", "parallel.tensor=8")
    _, out, _ = run_plan(capsys, path, *overrides, "--nodes", "4", "--json")
    found = json.loads(out)
    program, verb, *words = shlex.split(found["launch"])
    assert (program, verb) == ("memoryformer", "launch")
    given = argparse.ArgumentParser()
    add_launch(given.add_subparsers(parser_class=CommandParser))
    parsed = given.parse_args([verb, *words])
    config = load_config(parsed.config, parsed.overrides)
    assert config.training.steps == 9
    layout = found["best"]
    assert (config.parallel.tensor, config.parallel.zero_stage, config.training.micro_batch_size) == (
        layout["tensor"],
        layout["zero_stage"],
        layout["micro_batch_size"],
    )
    assert check_job(config, JobOptions(nodes=parsed.nodes, gpus_per_node=parsed.gpus_per_node)) == [4]


def test_where_little_fits_the_plan_says_what_would(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On 85 GB base needs the host's memory or other moments; on 50 GB of a CPU's process the latter."""
    arguments = (str(CONFIGS / "base.yaml"), "parallel.tensor=1", "--nodes", "1", "--gpus-per-node", "1")
    (tmp_path / "cpu.yaml").write_text("base: cpu\nmemory: 7.2e+10\n")
    for device, offload in (("h100", "optimizer"), (str(tmp_path / "cpu.yaml"), None)):
        _, out, _ = run_plan(capsys, *arguments, "--device", device, "--json")
        found = json.loads(out)
        assert (found["best"] and found["best"]["offload"]) == offload
        assert offload is None or "parallel.offload=optimizer" in found["launch"].split()
        lighter = found["lighter"]
        assert lighter["layout"]["fits"] and lighter["layout"]["offload"] == "none" and lighter["keys"]
        for key, value in lighter["keys"].items():
            assert f"{key}={value}" in lighter["launch"].split()
        _, out, _ = run_plan(capsys, *arguments, "--device", device)
        keys = " ".join(f"{key}={value}" for key, value in lighter["keys"].items())
        start = "without offload" if offload else "nothing fits; it"
        assert f"{start} would fit, with other results (docs/memory.md): {keys}\n" in out
        assert lighter["launch"] in out
    _, out, _ = run_plan(capsys, *arguments, "--device", "l4", "--json")
    assert (json.loads(out)["best"], json.loads(out)["launch"], json.loads(out)["lighter"]) == (
        None,
        None,
        None,
    )
    _, out, _ = run_plan(capsys, str(CONFIGS / "base.yaml"), "--json")
    assert json.loads(out)["lighter"] is None


def test_the_command_tells_size_cost_and_launch_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_plan(capsys, str(CONFIGS / "tiny.yaml"), "--rows", "3", "--cost-per-hour", "2.5")
    assert code == 0
    for text in (
        "466,784,512 parameters",
        "143,000 steps x 2,097,152 tokens = 299.9 billion tokens",
        "5.601 GB a checkpoint",
        "rates are data-sheet or assumed, not measured",
        "device-hours, cost ",
        "bytes/s, a guess) a step takes",
        "memoryformer launch ",
        "not modelled: ",
    ):
        assert text in out
    table = out[out.index(" P     R ZeRO") :].splitlines()
    assert all(len(line.split()) == 12 for line in table[:4]) and not table[4]


def test_a_measured_run_is_shown_beside_the_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(CONFIGS / "quickstart.yaml")
    tokens = 8 * 256
    slow = [9.0] * 3 + [2.0, 4.0, 3.0]  # the first three steps of a start are left out
    records = [
        {"step": 1 + i, "tokens": tokens * (1 + i), "step_seconds": seconds, "peak_memory_bytes": 10**9 + i}
        for i, seconds in enumerate(slow)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in records) + '{"step": 7,'
    )
    given = [path, "--gpus-per-node", "2", "--device", "cpu", "--measured", str(tmp_path)]
    code, out, _ = run_plan(capsys, *given)
    assert code == 0 and "MEASURED 3.000 s a step" in out and "MEASURED peak 1.00 GB" in out
    _, out, _ = run_plan(capsys, *given, "--json")
    assert json.loads(out)["measured"] == {"steps": 3, "step_seconds": 3.0, "peak_bytes": 10**9 + 5}
    code, _, error = run_plan(capsys, *given, "training.global_batch_size=16")
    assert code == 2 and "give the configuration that it ran" in error


PHASES = (
    "phases=[{name: ramp, start: 101, training: {global_batch_size: 16}}, {name: long, start: 251, model: "
    "{sequence_length: 512}, optimizer: {table_learning_rate_multiplier: 3}, schedule: {kind: linear}}]"
)


def test_what_a_phase_sets_is_not_changed_by_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A phase's own value wins, so the launch line alone would not be the layout that is planned."""
    phase = "{name: long, start: 500, model: {sequence_length: 65536}, training: {micro_batch_size: 8}}"
    given = [str(CONFIGS / "tiny.yaml"), f"phases=[{phase}]", "training.global_batch_size=64"]
    given += ["parallel.tensor=1", "--gpus-per-node", "8", "--device", "l40s"]
    code, out, _ = run_plan(capsys, *given, "--json")
    found = json.loads(out)
    micro = found["best"]["micro_batch_size"]
    assert code == 0 and found["phase"] == "long" and micro < 8
    assert "training.micro_batch_size=" not in found["launch"]
    (edit,) = found["phase_edits"]
    assert edit == f"training.micro_batch_size: {micro} in phase 'long' of {given[0]}"
    assert f"  first write {edit}, which the command line cannot change" in run_plan(capsys, *given)[1]
    given[1] = given[1].replace("micro_batch_size: 8", f"micro_batch_size: {micro}")
    again = json.loads(run_plan(capsys, *given, "--json")[1])
    assert again["best"] == found["best"] and again["phase_edits"] == []


def test_every_phase_is_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = [str(CONFIGS / "quickstart.yaml"), PHASES, "--gpus-per-node", "2", "--device", "cpu"]
    sizes = [8 * 256] * 100 + [16 * 256] * 150 + [16 * 512] * 50
    totals = [sum(sizes[: step + 1]) for step in range(len(sizes))]
    records = [
        {"step": step, "tokens": tokens, "step_seconds": size / 1e3}
        for step, (tokens, size) in enumerate(zip(totals, sizes, strict=True), 1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    code, out, _ = run_plan(capsys, *given, "--measured", str(tmp_path))
    assert code == 0 and f"300 steps = {sum(sizes) / 1e9:.4g} billion tokens" in out
    for line in ("'main': steps 1 to 100, 8 x 256", "'ramp': steps 101 to 250, 16 x 256"):
        assert f"phase {line} tokens; as configured" in out
    assert "below: as if all steps were of phase 'long', which takes the most memory" in out
    assert f"MEASURED {16 * 512 / 1e3:.3f} s a step" in out
    tree = json.loads(run_plan(capsys, *given, "--json")[1])
    config = load_config(given[0], [PHASES])
    each = [(phase.last - phase.first + 1, phase.config) for phase in phases_of(config)]
    assert tree["model"]["tokens"] == sum(sizes) and tree["phase"] == "long"
    assert tree["model"]["model_flops"] == pytest.approx(
        sum(steps * step_tokens(here) * model_flops(here.model) for steps, here in each)
    )
    assert tree["configured"]["bytes"]["peak"] == max(round(peak_bytes(here, 2, "cpu")) for _, here in each)
    (of_tables,) = [scales for scales, groups in rate_lines(config).items() if "tables" in groups]
    rates, tables = dict(schedule_points(config)), dict(schedule_points(config, of_tables))
    assert rates == {step: rate_of(phase_at(config, step), step) for step in (rates.keys())}
    assert {tables[step] / rates[step] for step in (1, 250)} == {1} and tables[251] == 3 * rates[251]


@pytest.mark.parametrize("steps", [1, 7, 10_000, 10**18])
def test_the_drawn_schedule_has_its_turns(steps: int) -> None:
    schedule = ScheduleConfig(kind="warmup_stable_decay", minimum_fraction=0.1)
    config = Config(schedule=schedule, training=TrainingConfig(steps=steps))
    points = dict(schedule_points(config))
    assert points.keys() <= set(range(1, steps + 1)) if steps < 10**6 else len(points) <= 2003
    turns = {1, warmup_steps(schedule, steps), steps - decay_steps(schedule, steps) or 1, steps}
    assert turns <= points.keys() and list(points) == sorted(points)
    for step, rate in points.items():
        assert rate == learning_rate(step, steps, config.optimizer.learning_rate, schedule)


def test_groups_that_have_one_rate_are_one_line() -> None:
    optimizer = {"table_learning_rate_multiplier": 2, "groups": {"head": {"learning_rate_multiplier": 0.5}}}
    lines = rate_lines(parse_config({"optimizer": optimizer}, "test"))
    assert lines == {(2.0,): ["tables", "ffn_tables"], (1.0,): ["embedding", "norms"], (0.5,): ["head"]}


def test_the_picture_is_a_png_and_nothing_is_left_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "curve.png"
    code, _, _ = run_plan(capsys, str(CONFIGS / "tiny.yaml"), "--plot", str(path))
    assert code == 0 and path.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--device", "h300"], "--device h300: choose one of h100, .*a100, .*cpu"),
        (["--nodes", "0"], "--nodes: 0: it must be a whole number, 1 or more"),
        (["--nodes", "x"], "--nodes: x: it must be"),
        (["--gpus-per-node", "-1"], "--gpus-per-node: -1: it must be"),
        (["--cost-per-hour", "free"], "--cost-per-hour: free: it must be"),
        (
            ["--nodes", "999", "--gpus-per-node", "7"],
            "no layout of 999 x 7 processes works.*global_batch_size 1024",
        ),
        (["--plot", "curve.svg"], "--plot curve.svg: the picture is a PNG"),
        (["--plot", "none/curve.png"], "--plot none/curve.png: there is no folder none"),
        (["--measured", "none"], "--measured none: .*metrics.jsonl does not exist"),
        (["--device", "none.yaml"], "--device none.yaml: cannot be read"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run_plan(capsys, str(CONFIGS / "tiny.yaml"), *arguments)
    assert code == 2 and not out
    assert re.search(expected, error.replace("\n", " "))


def test_the_plan_needs_no_torch() -> None:
    """Its import takes seconds."""
    code = (
        "import sys\nfrom mf_train.cli import main\ntry: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "plan", str(CONFIGS / "base.yaml"), "--nodes", "4"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
