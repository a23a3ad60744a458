"""The memory model against what ranks really take (benchmarks.plan_memory)."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mf_train.config import Config, ModelConfig
from mf_train.config.loading import config_to_tree
from mf_train.model.counts import count_parameters
from mf_train.planning.device_memory import LIBRARIES, estimate_memory
from tests.planning.configs import make_config as make
from tests.planning.configs import run_python

TABLES = ModelConfig(hidden_size=256, num_layers=4, num_heads=4, bits=8, vocab_size=8192, sequence_length=128)
ROWS = ModelConfig(hidden_size=128, num_layers=6, num_heads=4, bits=4, vocab_size=4096, sequence_length=512)
LONG = replace(ROWS, num_layers=4, bits=8)  # its activations are larger than its tables
DEEP = replace(ROWS, num_layers=16, vocab_size=1024)  # its activations are larger than its logits
DENSE = replace(ROWS, kind="dense", hidden_size=512, vocab_size=16384)


def recomputed(config: Config) -> Config:
    return replace(config, training=replace(config.training, recompute="block"))


def offload(config: Config) -> Config:
    return replace(config, parallel=replace(config.parallel, offload="optimizer"))


# processes and configurations: every stage, both precisions, tables or activations as the larger part
CASES = {
    "stage 0": (1, make(TABLES, 2, 2, 1, 0, "float32")),
    "stage 1, 2 x data": (2, make(TABLES, 2, 1, 1, 1, "float32")),
    "stage 3, 2 x data": (2, make(TABLES, 2, 1, 1, 3, "float32")),
    "bfloat16, stage 1": (1, make(TABLES, 2, 2, 1, 1, "bfloat16")),
    "bfloat16, stage 2": (1, make(TABLES, 2, 2, 1, 2, "bfloat16")),
    "long rows": (1, make(ROWS, 8, 8, 1, 1, "float32")),
    "long rows, 2 x tensor": (2, make(ROWS, 8, 8, 2, 1, "float32")),
    "long rows, bfloat16": (1, make(ROWS, 8, 8, 1, 2, "bfloat16")),
    "stage 0, 2 micro-batches": (1, make(LONG, 16, 8, 1, 0, "float32")),
    "bfloat16, stage 0, 2 micro-batches": (1, make(LONG, 16, 8, 1, 0, "bfloat16")),
    "bfloat16, stage 2, 2 x data": (2, make(TABLES, 2, 1, 1, 2, "bfloat16")),
    "bfloat16, stage 3, 2 x data": (2, make(TABLES, 2, 1, 1, 3, "bfloat16")),
    "bfloat16 moments": (1, make(TABLES, 2, 2, 1, 1, "float32", ("bfloat16", "bfloat16", "float32"))),
    "split masters": (1, make(TABLES, 2, 2, 1, 1, "bfloat16", ("float32", "float32", "split"))),
    "int8 moments, stage 0": (1, make(TABLES, 2, 2, 1, 0, "bfloat16", ("int8", "int8", "float32"))),
    "least, stage 1": (1, make(TABLES, 2, 2, 1, 1, "bfloat16", ("int8", "row", "split"))),
    "least, stage 2, 2 x data": (2, make(TABLES, 2, 1, 1, 2, "bfloat16", ("int8", "row", "split"))),
    "int8 and row, stage 3, 2 x data": (2, make(TABLES, 2, 1, 1, 3, "bfloat16", ("int8", "row", "float32"))),
    "offloaded": (1, offload(make(TABLES, 2, 2, 1, 1, "float32"))),
    "offloaded, bfloat16, split, 2 x data": (
        2,
        offload(make(TABLES, 2, 1, 1, 1, "bfloat16", ("float32", "float32", "split"))),
    ),
    "dense": (1, make(DENSE, 4, 2, 1, 1, "float32")),
    "deep": (1, make(DEEP, 16, 8, 1, 1, "float32")),
    "recomputed": (1, recomputed(make(DEEP, 16, 8, 1, 1, "float32"))),
    "recomputed, 2 x tensor": (2, recomputed(make(DEEP, 16, 8, 2, 0, "float32"))),
    "recomputed, bfloat16": (1, recomputed(make(DEEP, 16, 8, 1, 2, "bfloat16"))),
    "recomputed, stage 3, 2 x data": (2, recomputed(make(DEEP, 16, 8, 1, 3, "float32"))),
    "recomputed, dense": (1, recomputed(make(replace(DENSE, vocab_size=1024), 16, 8, 1, 1, "float32"))),
}


def measured_peak(config: Config, processes: int, folder: Path) -> int:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config_to_tree(config)), encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # freed tensors go back to the system at once, so that resident memory is what is held
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run_python(*launcher, "-m", "benchmarks.plan_memory", str(path), str(folder), **at_once)
    return max(max(json.loads((folder / f"{rank}.json").read_text())["peaks"]) for rank in range(processes))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_within_a_tenth_of_a_real_rank(name: str, tmp_path: Path) -> None:
    processes, config = CASES[name]
    predicted = estimate_memory(config, processes, "cpu").peak - LIBRARIES  # measured from there on
    assert predicted == pytest.approx(measured_peak(config, processes, tmp_path), rel=0.1)


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


def test_saving_beside_the_steps_takes_host_memory() -> None:
    config = make(TABLES, 2, 1, 1, 1, "float32")
    assert estimate_memory(config, 2).host == 0
    config = replace(config, checkpoint=replace(config.checkpoint, interval=5))
    assert estimate_memory(config, 2).host == pytest.approx(estimate_memory(config, 1).host / 2)
