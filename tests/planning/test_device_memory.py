"""The memory model against what ranks really take (benchmarks.plan_memory)."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.plan_memory import CASES, DEEP, ROWS, TABLES, measure, predict
from mf_train.config import Config
from mf_train.model.counts import count_parameters
from mf_train.planning.device_memory import estimate_memory
from tests.planning.configs import make_config as make


def recomputed(config: Config) -> Config:
    return replace(config, training=replace(config.training, recompute="block"))


def offload(config: Config) -> Config:
    return replace(config, parallel=replace(config.parallel, offload="optimizer"))


@pytest.mark.slow
@pytest.mark.parametrize("processes", sorted({processes for processes, _ in CASES.values()}))
def test_near_what_real_ranks_take(processes: int, tmp_path: Path) -> None:
    configs = {name: config for name, (needed, config) in CASES.items() if needed == processes}
    measured = measure(configs, processes, tmp_path)
    errors = {name: predict(config, processes) / measured[name] - 1 for name, config in configs.items()}
    # two are known to lie beyond a tenth (docs/planning.md)
    assert {name: error for name, error in errors.items() if abs(error) > 0.12} == {}


def test_stages_share_what_they_say() -> None:
    for stage, shared in ((0, ()), (1, ("optimizer",)), (3, ("optimizer", "parameters"))):
        one, four = (
            estimate_memory(make(TABLES, 4, 1, 1, stage, "float32"), ranks, "cpu") for ranks in (1, 4)
        )
        for name in ("parameters", "optimizer"):
            assert getattr(one, name) == getattr(four, name) * (4 if name in shared else 1)


def test_recomputation_keeps_inputs_and_what_was_received() -> None:
    for tensor in (1, 2):
        plain = make(DEEP, 8, 8, tensor, 1, "bfloat16")
        before, after = (estimate_memory(each, tensor, "cpu") for each in (plain, recomputed(plain)))
        assert after.codes == (before.codes if tensor > 1 else 0)
        assert after.activations < before.activations / (8 if tensor == 1 else 3)
        assert before.peak - after.peak < before.activations - after.activations  # one block has them all


def test_a_gpu_holds_whole_buckets() -> None:
    config = make(TABLES, 2, 2, 1, 3, "float32")
    config = replace(config, parallel=replace(config.parallel, bucket_size=10**9))
    difference = estimate_memory(config, 1, "cuda").gradients - estimate_memory(config, 1, "cpu").gradients
    assert difference == pytest.approx(2 * 4 * 10**9, rel=0.2)  # two, for overlap


def test_tensor_parallelism_shares_all_but_codes() -> None:
    one, two = (estimate_memory(make(ROWS, 8, 8, p, 0, "bfloat16"), p, "cuda") for p in (1, 2))
    assert two.codes == one.codes
    assert two.logits == one.logits / 2
    assert two.parameters == one.parameters / 2


@pytest.mark.parametrize("held", [("float32", "float32", "float32"), ("int8", "row", "split")])
def test_what_is_offloaded_is_in_the_hosts_memory(held: tuple[str, str, str]) -> None:
    config = make(TABLES, 2, 1, 1, 1, "bfloat16", held)
    there, gone = (estimate_memory(each, 2, "cuda") for each in (config, offload(config)))
    assert gone.optimizer == 0 and there.host == 0
    moved = there.peaks["reduce"] - gone.peaks["reduce"]
    assert moved == pytest.approx(there.optimizer)
    # gradients are copied there, and a split master has its weight beside it
    extra = (4 + 2 * (held[2] == "split")) * count_parameters(TABLES).total / 2
    assert gone.host == pytest.approx(moved + extra)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_an_average_takes_four_bytes_of_what_a_rank_owns(stage: int) -> None:
    config = make(TABLES, 2, 1, 1, stage, "bfloat16")
    averaged = replace(config, training=replace(config.training, average_decay=0.999))
    owned = count_parameters(TABLES).total / (2 if stage else 1)
    for device, where in (("cpu", "peak"), ("cuda", "peak")):
        before, after = (getattr(estimate_memory(each, 2, device), where) for each in (config, averaged))
        assert after - before == pytest.approx(4 * owned)
    before, after = (estimate_memory(offload(each), 2, "cuda").host for each in (config, averaged))
    assert after - before == pytest.approx(4 * owned)


def test_saving_beside_the_steps_takes_host_memory() -> None:
    config = make(TABLES, 2, 1, 1, 1, "float32")
    assert estimate_memory(config, 2).host == 0
    config = replace(config, checkpoint=replace(config.checkpoint, interval=5))
    assert estimate_memory(config, 2).host == pytest.approx(estimate_memory(config, 1).host / 2)


def test_a_table_larger_than_what_stays_gathered_is_gathered_whole() -> None:
    """Stage 3 keeps 10^9 elements gathered; a table of 48 x 64 features has 384 x 2^10 x 3072."""
    model = replace(TABLES, hidden_size=3072, num_heads=48, num_layers=2)
    config = make(model, 16, 1, 1, 3, "bfloat16")
    gathered = []
    for sized in (model, replace(model, hidden_size=2048, num_heads=32)):
        memory = estimate_memory(replace(config, model=sized), 16)
        fixed = memory.parameters + memory.optimizer + memory.gradients + memory.process
        kept = memory.activations + memory.logits
        gathered.append((memory.peaks["loss"] - fixed - kept) / 2)
    # logits are more than what a block's backward pass holds
    assert gathered == [pytest.approx(384 * 2**10 * 3072, rel=0.01), pytest.approx(1e9, rel=0.01)]
