"""What is refused before anything is submitted, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mf_train.config import Config
from mf_train.config.loading import parse_config
from mf_train.errors import UserError
from mf_train.launch.limits import (
    check_job,
    checkpoint_bytes,
    left_out,
    memory_warnings,
    notice_seconds,
    warnings,
)
from mf_train.launch.options import JobOptions
from mf_train.planning.device_memory import estimate_memory, peak_bytes

GPUS = JobOptions(nodes=2, gpus_per_node=4, time="1:00:00")


def states(wanted: Config, processes: int) -> float:
    """What the update needs on a GPU."""
    return estimate_memory(wanted, processes, "cuda").peaks["update"]


def config(**sections: dict[str, object]) -> Config:
    tree: dict[str, dict[str, object]] = {
        "training": {"global_batch_size": 64, "micro_batch_size": 4},
        "checkpoint": {"interval": 10},
    }
    for name, keys in sections.items():
        tree.setdefault(name, {}).update(keys)
    return parse_config(tree, "test")


BASE = {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "vocab_size": 50304}


def test_a_size_that_fits_is_one_number() -> None:
    assert check_job(config(), GPUS) == [2]


@pytest.mark.parametrize(
    ("sections", "options", "expected"),
    [
        (
            {},
            {"nodes": 17},
            r"17 nodes x 4 GPUs: training.global_batch_size 64 leaves .* 68 data-parallel ranks",
        ),
        ({"parallel": {"tensor": 8}}, {}, "parallel.tensor 8 does not divide the 4 processes of a node"),
        ({"parallel": {"tensor": 3}}, {"gpus_per_node": 3}, "choose 1, 2, 4 or 8"),
        ({"checkpoint": {"resume": "never"}}, {}, "checkpoint.resume is never.*checkpoint.resume=auto"),
        ({}, {"gpus_per_node": None}, "give --gpus-per-node G, or .* --tasks-per-node"),
        ({}, {"tasks_per_node": 4}, "not both"),
        ({"training": {"device": "cuda"}}, {"gpus_per_node": None, "tasks_per_node": 1}, "device is cuda"),
        ({}, {"nodes": 0}, "--nodes is 0"),
        ({}, {"gpus_per_node": -1}, "--gpus-per-node is -1"),
        ({}, {"gpu_memory": 0}, "--gpu-memory is 0"),
        ({}, {"retries": -1}, "--retries is -1"),
        ({}, {"time": "1h"}, "--time 1h"),
        ({}, {"notice": 0}, "--notice is 0"),
        ({}, {"notice": 70000}, "at most 65535"),
        ({}, {"notice": 3600}, r"notice of 3600 s .* not less than --time 1:00:00"),
        ({}, {"time": "2"}, r"notice of 1\d\d s .* --notice"),
        ({}, {"array": "a"}, "--array a"),
        ({}, {"elastic": (4, 2), "nodes": 1}, "--elastic 4:2"),
        ({}, {"elastic": (0, 2), "nodes": 1}, "--elastic 0:2"),
        ({}, {"elastic": (1, 4)}, "leave --nodes out, or give 4"),
        ({}, {"elastic": (17, 17), "nodes": 17}, "17 nodes x 4 GPUs: training.global_batch_size"),
        ({}, {"elastic": (17, 19), "nodes": 1}, r"--elastic 17:19: no number of nodes works; 19 nodes"),
        ({}, {"exclusive": False}, "--no-exclusive.*--cpus-per-task"),
        ({}, {"sbatch": ("constraint=h100",)}, "--sbatch=--constraint=h100"),
        ({}, {"partition": "a\nb"}, "--partition is 'a\\\\nb'"),
        ({}, {"account": ""}, "--account is ''"),
        ({}, {"container_mounts": ("/data:/data",)}, "give --container"),
        ({}, {"container_mounts": ("/data",), "container": "image"}, "write FROM:TO"),
    ],
)
def test_refusals(sections: dict[str, dict[str, object]], options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        check_job(config(**sections), replace(GPUS, **options))  # type: ignore[arg-type]


def test_an_elastic_job_uses_any_number_of_nodes_that_has_sequences() -> None:
    options = replace(GPUS, nodes=1, elastic=(1, 18))
    usable = check_job(config(), options)
    assert usable == [*range(1, 17)]
    assert left_out(options, usable) == [17, 18]


def test_an_elastic_job_leaves_out_numbers_that_do_not_fit() -> None:
    """Stage 1 shards moments and masters: a small memory holds it on 4 nodes and not on 1."""
    wanted = config(model=BASE, parallel={"zero_stage": 1}, training={"precision": "bfloat16"})
    room = states(wanted, 8) / 1e9 + 0.1
    options = replace(GPUS, nodes=1, elastic=(1, 4), gpu_memory=room)
    assert check_job(wanted, options) == [2, 3, 4]


def test_a_model_that_does_not_fit_on_its_gpus() -> None:
    wanted = config(model=BASE, parallel={"zero_stage": 0})  # 6.75 billion parameters
    with pytest.raises(UserError, match=r"2 nodes x 4 GPUs: does not fit: 6.75 billion .* a GPU has 80 GB"):
        check_job(wanted, GPUS)
    assert check_job(wanted, replace(GPUS, gpu_memory=192.0)) == [2]
    assert check_job(config(model=BASE, parallel={"zero_stage": 0, "tensor": 4}), GPUS) == [2]


def test_a_model_that_does_not_fit_on_nodes_without_gpus() -> None:
    wanted = config(model=BASE)
    options = JobOptions(nodes=2, tasks_per_node=2, time="60")
    assert check_job(wanted, options, None) == [2]  # a cluster that does not say
    assert not memory_warnings(wanted, options, 2, None)
    assert check_job(wanted, options, 512 * 2.0**30) == [2]
    with pytest.raises(UserError, match=r"a node of the partition has 68\.7 GB for 2"):
        check_job(wanted, options, 64 * 2.0**30)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_states_are_refused_and_a_predicted_peak_is_warned_of(precision: str, stage: int) -> None:
    wanted = config(
        model=BASE, parallel={"tensor": 4, "zero_stage": stage}, training={"precision": precision}
    )
    held, peak = states(wanted, 8) / 1e9, peak_bytes(wanted, 8, "cuda") / 1e9
    with pytest.raises(UserError, match="memoryformer plan CONFIG --nodes 2 --gpus-per-node 4 --device h100"):
        check_job(wanted, replace(GPUS, gpu_memory=held * 0.999))
    large = replace(GPUS, gpu_memory=peak * 1.001)
    assert check_job(wanted, large) == [2] and not memory_warnings(wanted, large, 2, None)
    assert held < peak
    if held < peak:
        between = replace(GPUS, gpu_memory=(held + peak) / 2)
        assert check_job(wanted, between) == [2]
        (warning,) = memory_warnings(wanted, between, 2, None)
        assert warning.startswith("may not fit: a process is predicted to need")


def test_stages_with_masters_apart_are_not_taken_for_less_than_they_need() -> None:
    """Stages 1 to 3 in float32 keep the optimiser's copy of the weights beside the model's: 4 + 12 / R at least."""
    model = BASE | {"num_layers": 2, "sequence_length": 64}
    for stage in (1, 2):
        wanted = config(model=model, parallel={"tensor": 1, "zero_stage": stage})
        least = (4 + 12 / 8) * checkpoint_bytes(wanted) / 12
        with pytest.raises(UserError, match="does not fit"):
            check_job(wanted, replace(GPUS, gpu_memory=0.99 * least / 1e9))


def test_the_notice_grows_with_the_checkpoint() -> None:
    small, large = config(model={"hidden_size": 64, "num_heads": 4, "vocab_size": 512}), config(model=BASE)
    assert notice_seconds(small, GPUS) == 120
    assert notice_seconds(large, GPUS) == 300  # 81 GB: 120 + 162, to a minute
    assert notice_seconds(large, replace(GPUS, notice=45)) == 45


def test_warnings() -> None:
    assert warnings(config(), GPUS) == []
    (line,) = warnings(config(checkpoint={"interval": 0}), GPUS)
    assert "checkpoint.interval is 0" in line
    (line,) = warnings(config(), replace(GPUS, time=None))
    assert "--time" in line
