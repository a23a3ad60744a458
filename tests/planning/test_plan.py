import json
from dataclasses import replace
from pathlib import Path

import pytest

from mf_train.cli import main
from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.planning.devices import find_device
from mf_train.planning.plan import make_layout, scaling, search
from mf_train.planning.time import estimate_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_a_measured_rate_overrides_the_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: h100\ngather: 1.0e+12\ninside: {bandwidth: 1.0e+11}\n")
    device, base = find_device(str(path)), find_device("h100")
    assert (device.gather, device.inside.bandwidth) == (1e12, 1e11)
    assert (device.copy, device.inside.latency) == (base.copy, base.inside.latency)


@pytest.mark.parametrize(
    "text", ["base: h200\n", "base: cpu\nspeed: 3\n", "base: cpu\ngather: fast\n", "[]\n"]
)
def test_a_wrong_device_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        find_device(str(path))


def test_a_slower_part_makes_a_slower_step() -> None:
    config, device = load_config(CONFIGS / "base.yaml"), find_device("h100")
    step = estimate_step(config, 4, 8, device)
    for name in ("gather", "copy"):
        slow = replace(device, **{name: getattr(device, name) / 10})
        assert estimate_step(config, 4, 8, slow).seconds > step.seconds
    slow = replace(device, between=replace(device.between, bandwidth=1e9))
    assert estimate_step(config, 4, 8, slow).seconds > step.seconds
    assert estimate_step(config, 1, 8, slow).seconds == estimate_step(config, 1, 8, device).seconds


def test_the_best_layout_fits_and_is_the_quickest_that_does() -> None:
    config, device = load_config(CONFIGS / "base.yaml"), find_device("h100")
    layouts = search(config, 1, 8, device)
    fitting = [layout for layout in layouts if layout.fits]
    assert fitting and len(fitting) < len(layouts)
    assert layouts[0].time.seconds == min(layout.time.seconds for layout in fitting)
    small = replace(device, memory=1e9)
    assert not any(layout.fits for layout in search(config, 1, 8, small))


def test_tensor_parallel_groups_stay_inside_a_node() -> None:
    config = load_config(CONFIGS / "base.yaml")
    with pytest.raises(UserError, match=r"parallel\.tensor"):
        make_layout(config, 4, 4, find_device("h100"))


def test_scaling_keeps_or_grows_the_batch() -> None:
    curves = scaling(load_config(CONFIGS / "base.yaml"), 8, find_device("h100"))
    assert [point["devices"] for point in curves["weak"]] == [8, 64, 512, 4096]
    assert {point["global_batch_size"] for point in curves["strong"]} == {1024}
    assert curves["weak"][-1]["global_batch_size"] == 512 * 1024
    seconds = [point["step_seconds"] for point in curves["strong"]]
    assert seconds == sorted(seconds, reverse=True)


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", str(CONFIGS / "tiny.yaml"), "--nodes", "1", "--gpus-per-node", "8", "--json"])
    assert end.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["fits"] and found["configured"]["tensor"] == 1
    assert sum(found["best"]["seconds"].values()) == pytest.approx(found["best"]["step_seconds"])


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(CONFIGS / "tiny.yaml"), "--rows", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert "466,784,512 parameters" in lines[0]
    assert len(lines[-1].split()) == len(lines[-4].split()[:10])
