"""AdamW over compact numbers in Triton beside float64 and C++: run as `triton_cases.py` is."""

from __future__ import annotations

import pytest
import torch

from mf_train.kernels import cpu, cpu_adamw, triton_adamw
from mf_train.parallel import adamw
from mf_train.parallel.kinds import KINDS
from tests.kernels.triton_cases import DEVICE, SLOW
from tests.parallel.test_adamw import COMPACT, check_steps, kernel_arguments

OFTEN = {("int8", "int8", "split"), ("bfloat16", "row", "float32"), ("float32", "bfloat16", "split")}


@pytest.mark.parametrize(
    "kinds", [pytest.param(kinds, marks=[] if kinds in OFTEN else SLOW) for kinds in COMPACT], ids=str
)
def test_adamw(kinds: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "fast_adamw", lambda gradient: triton_adamw)
    check_steps(*kinds, torch.device(DEVICE), steps=2)


@pytest.mark.skipif(cpu.library() is None, reason=cpu.reason())
@pytest.mark.parametrize("unit", [1, 40, 64])
@pytest.mark.parametrize(
    "kinds",
    [
        pytest.param(kinds, marks=[] if kinds in OFTEN else SLOW)
        for kinds in COMPACT
        if kinds[1] != "row"  # whose mean has an order of its own
    ],
    ids=str,
)
def test_adamw_has_the_bits_of_cpp(kinds: tuple[str, str, str], unit: int) -> None:
    results = []
    for kernel, device in ((cpu_adamw, "cpu"), (triton_adamw, DEVICE)):
        gradient, fragment, rates, draw = kernel_arguments(*kinds, unit, 75)
        held = [fragment.values[kind].held for kind in KINDS]
        held = [each._replace(tensors=tuple(t.to(device) for t in each.tensors)) for each in held]
        kernel.update(gradient.to(device), unit, *held, rates, draw)
        results.append([tensor.cpu() for each in held for tensor in each.tensors])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
