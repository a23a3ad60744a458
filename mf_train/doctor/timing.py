"""Seconds of alternatives, and the bandwidth of memory, as `doctor` and the benchmarks measure them."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def compare(
    alternatives: Mapping[str, Callable[[], object]], seconds: float = 2.0, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each alternative, called in turn until `seconds` are over, and each at least 5 times.

    In turn, so that a slow moment of a shared machine falls on all of them.
    """
    for function in list(alternatives.values()) * warmup:
        function()
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in alternatives.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def copy_bandwidth(seconds: float = 1.0) -> float:
    """Bytes a second, read plus written, of copying an array that no cache holds, with torch's threads."""
    source = torch.ones(2**26)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / compare({"copy": lambda: target.copy_(source)}, seconds)["copy"]
