"""What the device reaches: copies, gathers of table rows from each level of memory, products, launches.

Gathers are the Triton lookup's own, on tables that fit in a multiprocessor's L1 cache, in L2, or in neither: the rows
that it reads, over its time. Each value is one that a kernel reached, not a data sheet's.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.gpu.device import TimedDevice
from benchmarks.gpu.steps import Steps, part_arguments
from mf_train.run_folder import read_records

DEVICE_FILE = "device.yaml"


def copies(device: TimedDevice) -> Mapping[str, float]:
    """Bytes a second, read plus written, from memory and inside L2."""
    return {
        "memory": device.copy_bandwidth(2**24 if device.rehearse else 2**30),
        "L2": device.copy_bandwidth(2**20 if device.rehearse else 6 * 2**20),
    }


# Tables, tau, columns, tokens; rows are bfloat16, so that the tables take 16 KiB, 4 MiB and 1 GiB.
_GATHERS = {"L1": (8, 4, 64, 65536), "L2": (64, 8, 128, 65536), "memory": (2048, 10, 256, 2048)}


def gather(device: TimedDevice, level: str) -> Mapping[str, float]:
    """Bytes of table rows read a second."""
    from mf_train.kernels import triton_backend

    num_tables, bits, columns, tokens = _GATHERS[level]
    if device.rehearse:
        num_tables, bits, columns, tokens = 2, min(bits, 4), 16, 12
    generator = torch.Generator(device.type).manual_seed(0)
    tables = torch.randn(
        num_tables, 2**bits, columns, dtype=torch.bfloat16, device=device.type, generator=generator
    )
    codes = torch.randint(0, 2**bits, (tokens, num_tables), device=device.type, generator=generator)
    codes = codes.to(torch.uint8 if bits <= 8 else torch.int16)
    weights = torch.rand(tokens, num_tables, device=device.type, generator=generator).bfloat16()
    seconds = device.measure([lambda: triton_backend.lookup(codes, weights, [tables])])
    return {level: tokens * num_tables * columns * 2 / seconds}


def products(device: TimedDevice) -> Mapping[str, float]:
    """FLOP a second of square products, a multiply-add being 2; float32 without TF32, as the trainer computes."""
    found = {}
    for dtype, size in ((torch.bfloat16, 8192), (torch.float32, 4096)):
        size = 256 if device.rehearse else size
        a, b = (torch.randn(size, size, device=device.type).to(dtype) for _ in range(2))
        name = str(dtype).removeprefix("torch.")
        found[name] = 2 * size**3 / device.measure([lambda a=a, b=b: a @ b])
    return found


def launches(device: TimedDevice) -> Mapping[str, float]:
    """Seconds of an operation too small to take any: one launched after the other, and each waited for."""
    x, count = torch.zeros(8, device=device.type), 2000

    def run(wait: bool) -> float:
        device.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            x.add_(1)
            if wait:
                device.synchronize()
        device.synchronize()
        return (time.perf_counter() - began) / count

    run(False)
    return {"behind each other": run(False), "waited for": run(True)}


def write_device_file(path: Path, results: Path, device: TimedDevice) -> Mapping[str, str]:
    """The rates as a file that `memoryformer plan --device FILE` reads, and a look whether it does."""
    import yaml

    from mf_train.planning.devices import find_device

    found: dict[str, Mapping[str, float]] = {}
    for line in read_records(results):
        found[line["step"]] = found.get(line["step"], {}) | line.get("values", {})
    rates: dict[str, object] = {"base": base_device(device)}
    if memory := found.get("copy", {}).get("memory"):
        rates["copy"] = round(memory)
    if row_rate := found.get("gather L2", {}).get("L2"):
        rates["gather"] = round(row_rate)
    if flops := found.get("product"):
        rates["flops"] = {name: round(rate) for name, rate in flops.items()}
    if launch := found.get("launch", {}).get("behind each other"):
        rates["launch"] = float(f"{launch:.3g}")
    if not device.rehearse:
        rates["memory"] = torch.cuda.mem_get_info()[1]
    text = "# Rates that the kernels reached, by `make gpu`; links between GPUs are the base device's.\n"
    path.write_text(text + yaml.safe_dump(rates, sort_keys=False), encoding="utf-8")
    read = find_device(str(path))
    return {"file": path.name, "base": str(rates["base"]), "measured": ", ".join(read.measured)}


def base_device(device: TimedDevice) -> str:
    """The name in devices.yaml of the device that this one is; h100 where it is none of them."""
    from mf_train.planning.devices import find_name

    return "cpu" if device.rehearse else find_name(torch.cuda.get_device_name()) or "h100"


def main() -> None:
    options = part_arguments(__doc__).parse_args()
    device, steps = TimedDevice(options.rehearse), Steps(options.results)
    steps.run("copy", lambda: copies(device))
    for level in ("L2", "memory", "L1"):
        steps.run(f"gather {level}", lambda level=level: gather(device, level))
    steps.run("product", lambda: products(device))
    steps.run("launch", lambda: launches(device))
    file = (options.folder or options.results.parent) / DEVICE_FILE
    steps.run("device file", lambda: write_device_file(file, options.results, device))


if __name__ == "__main__":
    main()
