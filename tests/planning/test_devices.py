"""The table of devices, and files of measured rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mf_train.errors import UserError
from mf_train.planning import devices
from mf_train.planning.devices import FILE_KEYS, find_device, find_peak

TABLE: dict[str, Any] = yaml.safe_load(Path(devices.__file__).with_name("devices.yaml").read_text())
GPUS = [name for name, tree in TABLE.items() if tree["kind"] == "cuda"]

# What torch.cuda.get_device_name says, and the data sheet's TFLOP/s in float32 and dense bfloat16, and GB/s.
SHEETS = [
    ("NVIDIA H100 80GB HBM3", 67, 1979 / 2, 3350),
    ("NVIDIA H100 PCIe", 51, 1513 / 2, 2000),
    ("NVIDIA H100 NVL", 60, 1671 / 2, 3900),
    ("NVIDIA GH200 480GB", 67, 1979 / 2, 4000),
    ("NVIDIA GH200 144G HBM3e", 67, 1979 / 2, 4900),
    ("NVIDIA H200", 67, 1979 / 2, 4800),
    ("NVIDIA H200 NVL", 60, 1671 / 2, 4800),
    ("NVIDIA B200", 600 / 8, 36000 / 16, 64000 / 8),
    ("NVIDIA A100-SXM4-80GB", 19.5, 312, 2039),
    ("NVIDIA A100-SXM4-40GB", 19.5, 312, 1555),
    ("NVIDIA A100 80GB PCIe", 19.5, 312, 1935),
    ("NVIDIA A100-PCIE-40GB", 19.5, 312, 1555),
    ("NVIDIA L40S", 91.6, 362.05, 864),
    ("NVIDIA GeForce RTX 4090", 82.6, 165.2, 1008),
    ("NVIDIA A10", 31.2, 125, 600),
    ("NVIDIA L4", 30.3, 242 / 2, 300),
    ("AMD Instinct MI300X", 163.4, 1307.4, 5300),
    ("AMD Instinct MI325X", 163.4, 1307.4, 6000),
]
FULL = {
    "kind": "cuda",
    "memory": 4.0e10,
    "copy": 1.0e12,
    "gather": 2.0e12,
    "flops": {"float32": 1.0e13, "bfloat16": 2.0e14},
    "launch": 5.0e-6,
    "host": 2.0e10,
    "inside": {"bandwidth": 2.0e11, "latency": 4.0e-6},
    "between": {"bandwidth": 2.0e10, "latency": 1.0e-5},
}


@pytest.mark.parametrize(("name", "float32", "bfloat16", "memory"), SHEETS, ids=[row[0] for row in SHEETS])
def test_peaks_are_those_of_the_data_sheets(
    name: str, float32: float, bfloat16: float, memory: float
) -> None:
    peak = find_peak(name)
    assert peak is not None
    found = (peak.flops["float32"] / 1e12, peak.flops["bfloat16"] / 1e12, peak.memory / 1e9)
    assert found == pytest.approx((float32, bfloat16, memory), rel=1e-3)


def test_every_name_is_of_one_device_and_has_a_sheet() -> None:
    names = [name for tree in TABLE.values() for name in tree["names"]]
    assert sorted(names) == sorted(row[0] for row in SHEETS)
    assert find_peak("Some CPU @ 2.00GHz") is None


@pytest.mark.parametrize("name", GPUS)
def test_assumed_rates_are_below_the_peaks_and_said_to_be_assumed(name: str) -> None:
    device, peak = find_device(name), TABLE[name]["peak"]
    assert find_device(name.upper()) == device
    assert device.measured == ()
    assert 0.6 * peak["memory"] < device.copy < peak["memory"]
    assert all(0.3 * peak[kind] < rate < peak[kind] for kind, rate in device.flops.items())


def write(path: Path, tree: Any) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def test_a_file_without_a_base_stands_by_itself(tmp_path: Path) -> None:
    device = find_device(write(tmp_path / "mine.yaml", FULL))
    assert (device.name, device.kind, device.memory, device.copy) == ("mine", "cuda", 4e10, 1e12)
    assert (device.flops, device.between.latency) == ({"float32": 1e13, "bfloat16": 2e14}, 1e-5)
    assert device.measured == ("between", "copy", "flops", "gather", "host", "inside", "launch")
    assert set(FULL) == set(FILE_KEYS)


def test_a_file_may_replace_all_that_a_benchmark_measures(tmp_path: Path) -> None:
    tree = {"base": "h200", "peak": {"memory": 5.0e12}}
    tree |= {key: FULL[key] for key in ("memory", "copy", "gather", "flops", "launch")}  # type: ignore[dict-item]
    device = find_device(write(tmp_path / "mine.yaml", tree))
    assert (device.copy, device.launch, device.memory, device.gather) == (1e12, 5e-6, 4e10, 2e12)
    assert device.inside == find_device("h200").inside
    assert device.measured == ("copy", "flops", "gather", "launch")


def test_a_file_replaces_some_of_its_base_s_rates(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: h100\ngather: 1.0e+12\ninside: {bandwidth: 1.0e+11}\n")
    device, base = find_device(str(path)), find_device("h100")
    assert (device.gather, device.inside.bandwidth) == (1e12, 1e11)
    assert (device.copy, device.inside.latency) == (base.copy, base.inside.latency)


@pytest.mark.parametrize(
    "text",
    [
        *("base: h300\n", "base: [cpu]\n", "base: cpu\nspeed: 3\n", "base: cpu\nmeasured: 5\n"),
        *("base: cpu\ngather: fast\n", "base: cpu\ncopy: .inf\n", "[]\n"),
    ],
)
def test_a_wrong_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        find_device(str(path))


@pytest.mark.parametrize("key", sorted(FULL))
def test_a_file_without_a_base_that_lacks_a_key_is_refused(key: str, tmp_path: Path) -> None:
    tree = {name: value for name, value in FULL.items() if name != key}
    with pytest.raises(UserError, match=rf"mine\.yaml: lacks {key}: give them, or name the device"):
        find_device(write(tmp_path / "mine.yaml", tree))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"flops": {"bfloat16": 1e14}}, "flops must have float32 and bfloat16"),
        ({"inside": {"bandwidth": 1e11}}, "inside and between bandwidth and latency"),
        ({"inside": 3.0}, "inside holds bandwidth, latency"),
        ({"flops": {"float16": 1e14}}, "flops holds float32, bfloat16"),
        ({"kind": "tpu"}, "kind is 'tpu': choose cpu or cuda"),
        ({"copy": 0}, "rates must be numbers above 0"),
        ({"launch": "6e-6"}, "rates must be numbers above 0"),
        ({"names": ["X"]}, "unknown key 'names'"),
        ({"base": None}, "name the device it changes"),
    ],
)
def test_a_wrong_file_without_a_base_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        find_device(write(tmp_path / "mine.yaml", FULL | change))
