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
from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.launch.arguments import add_launch
from mf_train.launch.limits import check_job
from mf_train.launch.options import JobOptions
from mf_train.planning.devices import find_device
from mf_train.planning.plan import choose, lighten, make_layout, search
from mf_train.planning.scaling import scaling
from mf_train.planning.time import estimate_step

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


def test_what_is_switched_on_is_the_least_that_fits() -> None:
    """Each key takes less than the ones before it, and without the last nothing fits."""
    one = replace(BASE, parallel=replace(BASE.parallel, tensor=1))
    found: dict[float, dict[str, str]] = {}
    for memory in (110e9, 80e9, 75e9, 60e9):
        device = replace(H100, memory=memory)
        assert choose(search(one, 1, 1, device)) is None
        lightened = lighten(one, 1, 1, device)
        assert lightened is not None
        changed, layout = lightened
        assert layout.fits
        for key, value in changed.items():
            section, name = key.split(".")
            assert getattr(getattr(layout.config, section), name) == value
        *before, last = changed.items()
        path = CONFIGS / "base.yaml"
        less = load_config(path, ["parallel.tensor=1", *(f"{key}={value}" for key, value in before)])
        if last[0] not in dict(before):
            assert choose(search(less, 1, 1, device)) is None
        found[memory] = changed
    assert [len(changed) for changed in found.values()] == sorted(len(changed) for changed in found.values())
    assert found[60e9]["parallel.offload"] == "optimizer"
    assert lighten(one, 1, 1, replace(H100, memory=1e9)) is None
    plain = replace(one, training=replace(one.training, precision="float32"))
    assert "parallel.master" not in lighten(plain, 1, 1, replace(H100, memory=100e9))[0]  # type: ignore[index]


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


def test_where_nothing_fits_the_plan_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (str(CONFIGS / "base.yaml"), "parallel.tensor=1", "--nodes", "1", "--gpus-per-node", "1")
    _, out, _ = run_plan(capsys, *arguments, "--device", "h100", "--json")
    found = json.loads(out)
    assert found["lighter"] and found["best"]["fits"]
    for key, value in found["lighter"].items():
        assert f"{key}={value}" in found["launch"].split()
    _, out, _ = run_plan(capsys, *arguments, "--device", "h100")
    keys = " ".join(f"{key}={value}" for key, value in found["lighter"].items())
    assert f"nothing fits as it is; this does with {keys} (docs/memory.md)" in out


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
    assert all(len(line.split()) == 11 for line in table[:4]) and not table[4]


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
