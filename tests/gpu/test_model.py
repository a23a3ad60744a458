"""The plain model on the device against float64, and cut into P column slices in one process."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.model.memory import Hash, Lookup, record_codes
from mf_train.model.norm import Norm
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.tensor import shard_model
from tests.gpu.device import device_or_skip, skip_without
from tests.models import random_model
from tests.parallel.test_tensor import (
    DTYPES,
    MODELS,
    SIZES,
    outputs_of,
    packed_documents,
    random_tokens,
)

DEVICE = device_or_skip()
if DEVICE == "cuda":
    skip_without("triton")
pytestmark = pytest.mark.usefixtures("settled_device")

Measured = Callable[[str, object], None]


@pytest.mark.parametrize("kind", MODELS)
def test_float32_against_float64(kind: str, measured: Measured) -> None:
    """Losses and every gradient, of those rows of the batch in which no code changed.

    A value at rounding distance of zero may change its code, and all behind it; that is no fault, and rare.
    """
    config = ModelConfig(**SIZES | MODELS[kind])
    plain = random_model(config, 1, torch.float32, std=0.2)
    tokens, targets = (torch.cat([t.roll(i, 1) for i in range(8)]) for t in random_tokens(config))
    numbers = packed_documents(tokens) if kind == "documents" else None
    results, rows = [], torch.ones(len(tokens), dtype=torch.bool)
    models = [copy.deepcopy(plain).to(DEVICE), copy.deepcopy(plain).double()]
    for model in models:
        device = model.head.weight.device
        with record_codes(model) as codes:
            losses = model(
                tokens.to(device),
                targets.to(device),
                documents_bs=None if numbers is None else numbers.to(device),
            )
        results.append((losses, {name: value.cpu() for name, value in codes.items()}))
    changed = 0
    for name, expected in results[1][1].items():
        different = results[0][1][name] != expected
        changed += int(different.sum())
        rows &= ~different.flatten(1).any(-1)
    assert rows.sum() >= len(rows) // 2, (
        f"{changed} codes changed, in {int((~rows).sum())} of {len(rows)} rows"
    )
    for losses, _ in results:
        losses[rows.to(losses.device)].mean().backward()
    error = (results[0][0].detach().cpu().double() - results[1][0].detach())[rows].abs().max().item()
    true = {name: p.grad for name, p in models[1].named_parameters()}
    errors = {
        name: ((p.grad.cpu().double() - true[name]).norm() / true[name].norm()).item()
        for name, p in models[0].named_parameters()
    }
    worst = max(errors, key=errors.__getitem__)
    found = f"losses {error:.1e}, gradients {errors[worst]:.1e} ({worst}), {changed} codes changed"
    measured("from float64", found)
    # 7e-6 and 3e-6 on a CPU; another order of sums, or another exponential, is not worse by a factor of ten
    assert error <= 1e-4 and errors[worst] <= 1e-4, found


class ThreadExchange(Exchange):
    """What the P threads of one process send each other, for forward passes: a backward would wait for itself."""

    def __init__(self, rank: int, shards: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.bytes_sent = rank, len(shards), 0
        self.shards, self.barrier = shards, barrier

    def all_gather(self, shard: Tensor) -> Tensor:
        self.shards[self.rank] = shard.contiguous()
        self.barrier.wait(60)
        gathered = torch.stack([t for t in self.shards if t is not None])
        self.barrier.wait(60)
        return gathered


def run_sharded(
    plain: torch.nn.Module, config: ModelConfig, size: int, documents: bool
) -> list[dict[str, Tensor]]:
    """Each rank's outputs by module, and its losses."""
    shards: list[Tensor | None] = [None] * size
    barrier, found = threading.Barrier(size), {}
    models = [
        shard_model(copy.deepcopy(plain), ThreadExchange(rank, shards, barrier)) for rank in range(size)
    ]

    def run(rank: int) -> None:
        try:
            with torch.no_grad():
                outputs, losses = outputs_of(models[rank], config, documents)
            found[rank] = outputs | {"losses": losses}
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(
        (e for e in found.values() if isinstance(e, BaseException)),
        key=lambda e: isinstance(e, threading.BrokenBarrierError),
    ):
        raise error
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MODELS)
def test_column_slices(kind: str, dtype: str, size: int, measured: Measured) -> None:
    """The forward pass of P ranks, beside the whole model's, module by module.

    On CPUs every bit is equal. On a GPU the kernels owe the same, since their sums across ranks have one order, so none
    of them may be the first whose output differs (lookups of one hash run together, unseen: test_kernels.py cuts
    those). Attention and logits are torch's, which may choose another kernel for another width: whether it does is
    measured, and bounded in the losses.
    """
    config, documents = ModelConfig(**SIZES | MODELS[kind]), kind == "documents"
    plain = random_model(config, 1, DTYPES[dtype], std=0.2).to(DEVICE)
    with torch.no_grad():
        outputs, losses = outputs_of(plain, config, documents)
    expected = outputs | {"losses": losses}
    assert len(expected) > 15
    different: list[str] = []
    for rank, found in enumerate(run_sharded(plain, config, size, documents)):
        assert list(found) == list(expected)
        for name, value in expected.items():
            if not name.endswith(("codes", "weights", "losses")):  # which every rank has whole
                value = value.chunk(size, dim=-1)[rank]
            if not torch.equal(found[name], value) and name not in different:
                different.append(name)
        error = (found["losses"].double() - losses.double()).abs().max().item()
        assert error <= (1e-4 if dtype == "float32" and not has_codes(different) else 0.5), (
            f"losses: {error:.1e}"
        )
    order = [name for name in expected if name in different]
    measured("differs first", order[0] if order else "nothing")
    if DEVICE == "cpu":
        assert not order
    if order and order[0] not in ("logits", "losses"):
        module = plain.get_submodule(order[0].split(" ")[0])
        assert not isinstance(module, Hash | Lookup | Norm | torch.nn.Embedding), (
            f"{order[0]} differs: {order}"
        )


def has_codes(names: list[str]) -> bool:
    return any(name.endswith("codes") for name in names)
