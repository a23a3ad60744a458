"""What `kernels.backend` makes of "auto"."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mf_train.kernels import (
    backends,
    choose_backend,
    composition,
    cpu,
    cuda,
    describe,
    fast_adamw,
    fast_loss,
    fast_norm,
    fast_rotary,
)
from mf_train.kernels.backends import fast_counting, find_backend
from mf_train.kernels.build import UnsupportedError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def auto_again() -> Iterator[None]:
    yield
    choose_backend("auto", CPU, torch.float32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with Triton and a GPU that the CUDA kernel is for, as far as the choice looks."""
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends, "_triton", lambda: TRITON)
    monkeypatch.setattr(backends, "_triton_steps", ModuleType)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device: "")


TRITON = ModuleType("triton_backend")


def tensor_on_gpu(dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(device=GPU, dtype=dtype, is_cpu=False, is_cuda=True, shape=(4, 16))


def everything(x: Any) -> list[ModuleType | None]:
    return [fast_norm(x), fast_loss(x), fast_adamw(x), fast_counting(x)]


def test_composition_takes_the_place_of_every_kernel() -> None:
    x = torch.zeros(4, 16)
    choose_backend("composition", CPU, torch.float32)
    assert find_backend("auto", x) is composition
    assert everything(x) == [None] * 4
    assert "kernels.backend is composition" in describe(CPU)


@pytest.mark.skipif(cpu.library() is None, reason=cpu.reason())
def test_one_asked_for_by_name_is_still_had() -> None:
    choose_backend("composition", CPU, torch.float32)
    assert find_backend("cpu", torch.zeros(1)) is cpu


@pytest.mark.usefixtures("hopper")
def test_composition_on_a_gpu() -> None:
    choose_backend("composition", GPU, torch.bfloat16)
    x = tensor_on_gpu()
    assert find_backend("auto", x) is composition
    assert [*everything(x), fast_rotary(x)] == [None] * 5
    assert not backends.uses_triton(GPU)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(("name", "lookups"), [("auto", TRITON), ("triton", TRITON), ("cuda", cuda)])
def test_the_rest_is_triton_s_beside_lookups_in_cuda(name: str, lookups: ModuleType) -> None:
    choose_backend(name, GPU, torch.bfloat16)
    x = tensor_on_gpu()
    assert find_backend("auto", x) is lookups
    assert None not in [fast_norm(x), fast_loss(x), fast_rotary(x), fast_adamw(x)]
    assert ("CUDA" in describe(GPU)) == (name == "cuda")
    # what is not the device's own: float64 checks, and AdamW on the host
    assert find_backend("auto", tensor_on_gpu(torch.float64)) is composition
    if cpu.library() is not None:
        assert find_backend("auto", torch.zeros(1)) is cpu


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("triton", torch.float32, "it computes on GPUs, and the tensors are on cpu"),
        ("cuda", torch.float32, "it computes on GPUs, and the tensors are on cpu"),
        ("cpu", torch.float16, "it does not compute in torch.float16"),
    ],
)
def test_one_that_cannot_run_is_refused_and_nothing_changes(
    name: str, dtype: torch.dtype, reason: str
) -> None:
    choose_backend("composition", CPU, torch.float32)
    with pytest.raises(UnsupportedError, match=reason):
        choose_backend(name, CPU, dtype)
    assert find_backend("auto", torch.zeros(1)) is composition


def test_a_compiler_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "reason", lambda: "there is no g++")
    with pytest.raises(UnsupportedError, match=r"there is no g\+\+"):
        choose_backend("cpu", CPU, torch.float32)
    choose_backend("auto", CPU, torch.float32)


def test_a_gpu_that_the_cuda_kernel_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(cuda, "unavailable_reason", lambda device: "this GPU has 8.0")
    with pytest.raises(UnsupportedError, match=r"this GPU has 8\.0"):
        choose_backend("cuda", GPU, torch.bfloat16)
