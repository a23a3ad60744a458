"""`memoryformer doctor`: what this machine has, what computes here and how fast, and what would make it faster."""

import logging
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch

from mf_train import kernels
from mf_train.doctor.timing import compare, copy_bandwidth
from mf_train.host_memory import available_memory
from mf_train.kernels import cpu
from mf_train.kernels.backends import has_triton
from mf_train.launch.machine import compiler_problem, cuda_versions, versions
from mf_train.processors import busy_processors, caches, cpu_quota, processor_name, usable_processors
from mf_train.text import human_bytes

DRIVER = Path("/proc/driver/nvidia/version")
# of the lookup that is timed: tiny.yaml's layer and micro-batch
_TOKENS, _SIZE, _BITS = 2048, 512, 8


def doctor() -> Iterator[str]:
    """Lines on versions, processors, memory, GPUs, threads, kernels and rates; then one for each thing to change."""
    logging.getLogger(kernels.__name__).setLevel(logging.ERROR)  # it is said below
    found = versions()
    yield _line("versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    yield _line("processors", _processors())
    yield _line("memory", human_bytes(available_memory() or 0) + " are left for programs")
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    yield _line("GPUs", ", ".join(f"{gpu.name} ({human_bytes(gpu.total_memory)})" for gpu in gpus) or "none")
    if gpus:
        yield _line("CUDA", ", ".join(f"{name} {version}" for name, version in cuda_versions().items()))
    yield _line("threads", f"{torch.get_num_threads()}, which wait {_waiting(os.environ)}")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if gpus else [])]
    for device in devices:
        yield _line(f"on a {'GPU' if device.type == 'cuda' else 'CPU'}", kernels.describe(device))
    yield _line("memory copy", f"{copy_bandwidth(0.5) / 1e9:.1f} GB/s, read and written")
    ratio, seconds = _lookup_rate()
    yield _line(
        "memory layer",
        f"{1e3 * seconds:.1f} ms forward and backward on the CPU for {_TOKENS:,} tokens of {_SIZE} features, "
        f"{ratio:.1f} times as fast as torch operations",
    )
    advice = list(suggestions(torch.get_num_threads(), bool(gpus), os.environ))
    yield ""
    yield "What would make it faster:" if advice else "Nothing to change was found."
    yield from (f"- {each}" for each in advice)


def suggestions(threads: int, gpus: bool, environment: Mapping[str, str]) -> Iterator[str]:
    """What to change, a sentence each; `threads` are torch's, `gpus` whether torch sees one."""
    if problem := cpu.reason():
        remedy = ": install g++" if "no compiler" in problem else ""
        yield f"lookups on the CPU run as torch operations, because {problem}{remedy}"
    processors = usable_processors()
    if threads > processors:
        quota = cpu_quota()
        why = (
            f"the control group gives time for {quota:g}"
            if quota is not None
            else f"{processors} may be used"
        )
        yield f"{threads} threads compute, but of the processors {why}: set OMP_NUM_THREADS={processors}"
    busy = busy_processors()
    if _waiting(environment) == "spinning" and busy is not None and busy > 0.5:
        yield (
            f"other programs keep {busy:.1f} of {processors} processors busy, and threads that spin while they wait "
            "take time from each other: set OMP_WAIT_POLICY=passive (training in one process does so by itself)"
        )
    if not gpus and DRIVER.is_file():
        yield (
            "the machine has an NVIDIA driver, but torch sees no GPU: install torch's CUDA build, or look at "
            "CUDA_VISIBLE_DEVICES"
        )
    if gpus and not has_triton():
        yield "lookups on the GPU run as torch operations: install triton"
    elif gpus and (missing := compiler_problem(environment)):
        yield f"this machine {missing}"


def _line(name: str, text: str) -> str:
    return f"{name:<14}{text}"


def _processors() -> str:
    quota = cpu_quota()
    parts = [
        processor_name(),
        f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} may be used",
        *([f"for {quota:g} of them the control group gives time"] if quota is not None else []),
        cpu.instruction_set().upper(),
        ", ".join(
            f"{name} {size / 1024:,.0f} KiB" + (f" for {shared}" if shared > 1 else "")
            for name, (size, shared) in caches().items()
        )
        or "caches not reported",
    ]
    return "; ".join(parts)


def _waiting(environment: Mapping[str, str]) -> str:
    """How OpenMP's threads wait for each other: libgomp spins for a while unless told otherwise (OpenMP 5.2, 21.7)."""
    return "asleep" if environment.get("OMP_WAIT_POLICY", "").lower() == "passive" else "spinning"


def _lookup_rate() -> tuple[float, float]:
    """How many times torch operations' rate what computes here has, and its seconds."""
    x = torch.randn(_TOKENS, _SIZE, requires_grad=True)
    tables = torch.randn(_SIZE // _BITS, 2**_BITS, _SIZE, requires_grad=True)

    def work(backend: str) -> None:
        codes, weights = kernels.hash_codes(x, _SIZE // _BITS, backend=backend)
        kernels.lookup(codes, weights, tables, backend=backend).sum().backward()

    times = compare({backend: partial(work, backend) for backend in ("auto", "composition")})
    return times["composition"] / times["auto"], times["auto"]
