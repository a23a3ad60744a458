"""Training's bits for every number of ranks: a rank's gradients are slices of the plain model's, to the last bit.

The plain model runs on two threads, each rank on one: where threads entered a sum, that would be seen too.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.config import ModelConfig
from mf_train.kernels import cpu
from mf_train.model import MemoryFormer
from mf_train.model.sharding import slice_of_rank
from mf_train.parallel.exchange import Exchange
from mf_train.parallel.tensor import shard_model
from tests.closeness import assert_close
from tests.distributed import run_distributed
from tests.models import random_model
from tests.parallel.test_tensor import DTYPES, MODELS, SIZES, packed_documents
from tests.threads import threads

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {name: SIZES | changes for name, changes in MODELS.items()} | {
    # chunks of 24 and 32 columns
    "quickstart": SIZES | {"hidden_size": 192, "bits": 6, "vocab_size": 512, "num_layers": 1},
    # chunks of 72 and 108 columns: more than one pass of a lookup's backward
    "wide": SIZES | {"hidden_size": 576, "bits": 4, "vocab_size": 264, "num_layers": 1},
}
OPERATIONS = ("C++", "torch")
BATCH, LENGTH = 9, 24
EVERY = [*itertools.product(OPERATIONS, CASES, DTYPES)]
# of the torch operations two shapes; the drills have all
QUICK = [each for each in EVERY if each[0] == "C++" or each[1] in ("quickstart", "documents")]


def losses_and_gradients(model: MemoryFormer, config: ModelConfig, documents: bool, seed: int) -> Tensor:
    """Token losses of two micro-batches, some tokens without loss; the gradients are left in the parameters."""
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(2):
        tokens = torch.randint(config.vocab_size, (BATCH, LENGTH + 1), generator=generator)
        tokens[:, ::3] = 3  # a frequent token
        targets = tokens[:, 1:].masked_fill(torch.rand(BATCH, LENGTH, generator=generator) < 0.1, -100)
        tokens = tokens[:, :-1]
        each = model(tokens, targets, documents_bs=packed_documents(tokens) if documents else None)
        each.mean().backward()
        losses.append(each.detach())
    return torch.cat(losses)


def different(
    model: MemoryFormer, expected: dict[str, Tensor], group: dist.ProcessGroup, case: str, seed: int
) -> list[str]:
    """The names of what has other bits on this rank than in the plain model; `expected` is the plain model's."""
    sharded = shard_model(copy.deepcopy(model), Exchange(group))
    losses = losses_and_gradients(sharded, model.config, case == "documents", seed)
    names = [] if torch.equal(losses, expected["losses"]) else ["losses"]
    for name, parameter in sharded.named_parameters():
        whole = slice_of_rank(expected[name], name, dist.get_rank(group), group.size())
        assert parameter.grad is not None
        if not torch.equal(parameter.grad, whole):
            names.append(name)
    return names


def plain_results(rank: int, model: MemoryFormer, case: str, seed: int) -> dict[str, Tensor]:
    """Losses and gradients of the plain model, computed once, on two threads, and sent to all ranks."""
    plain = copy.deepcopy(model)
    results = {name: torch.empty_like(parameter) for name, parameter in plain.named_parameters()}
    results["losses"] = torch.empty(2 * BATCH, LENGTH)
    if rank == 0:
        with threads(2):
            results["losses"] = losses_and_gradients(plain, model.config, case == "documents", seed)
        for name, parameter in plain.named_parameters():
            assert parameter.grad is not None
            results[name] = parameter.grad
    for tensor in results.values():
        dist.broadcast(tensor.detach(), 0)
    return results


def all_cases(
    rank: int, world_size: int, degrees: tuple[int, ...], cases: list[tuple[str, str, str]]
) -> dict[tuple[str, str, str, int], list[str]]:
    results = {}
    library = cpu.library
    groups = [dist.new_group(list(range(size))) for size in degrees]
    for seed, (operations, case, dtype) in enumerate(cases):
        cpu.library = library if operations == "C++" else lambda: None
        model = random_model(ModelConfig(**CASES[case]), seed, DTYPES[dtype], std=0.2)
        expected = plain_results(rank, model, case, seed)
        for size, group in zip(degrees, groups, strict=True):
            if rank < size:
                results[operations, case, dtype, size] = different(model, expected, group, case, seed)
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def results() -> list[dict[tuple[str, str, str, int], list[str]]]:
    """Of each rank."""
    return run_distributed(all_cases, 4, (2, 4), QUICK, init=True, timeout=600)


@pytest.fixture(scope="module")
def results_of_eight() -> list[dict[tuple[str, str, str, int], list[str]]]:
    return run_distributed(all_cases, 8, (2, 4, 8), EVERY, init=True, timeout=900)


@pytest.mark.parametrize(("operations", "case", "dtype"), QUICK)
@pytest.mark.parametrize("size", [2, 4])
def test_every_gradient_has_the_same_bits(
    operations: str, case: str, dtype: str, size: int, results: Any
) -> None:
    if operations == "C++" and cpu.library() is None:
        pytest.skip(cpu.reason())
    for rank in range(size):
        assert results[rank][operations, case, dtype, size] == []


@pytest.mark.slow
@pytest.mark.parametrize(("operations", "case", "dtype"), EVERY)
@pytest.mark.parametrize("size", [2, 4, 8])
def test_and_on_eight_ranks(operations: str, case: str, dtype: str, size: int, results_of_eight: Any) -> None:
    if operations == "C++" and cpu.library() is None:
        pytest.skip(cpu.reason())
    for rank in range(size):
        assert results_of_eight[rank][operations, case, dtype, size] == []


@pytest.mark.parametrize("operations", OPERATIONS)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_float64(operations: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of weights that are exact in float32, so that every code is the same."""
    config = ModelConfig(**CASES[case])
    model, exact = random_model(config, 5, torch.float32, std=0.2), random_model(config, 5, std=0.2)
    if operations == "torch":
        monkeypatch.setattr(cpu, "library", lambda: None)
    losses = losses_and_gradients(model, config, case == "documents", 6)
    expected = losses_and_gradients(exact, config, case == "documents", 6)
    assert_close(losses, expected, 1e-5)
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert_close(one.grad, other.grad, 1e-4)
