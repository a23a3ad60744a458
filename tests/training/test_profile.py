"""Profiles of real runs: what is written, that the parts are the whole, and that training does not feel it."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from benchmarks.micro_batches import backward_passes
from mf_train.checkpoint.layout import step_name
from mf_train.config import Config, ParallelConfig, ProfileConfig, TrainingConfig
from mf_train.model import MemoryFormer, ModelConfig
from mf_train.parallel.degrees import Degrees
from mf_train.parallel.engine import Engine
from mf_train.parallel.groups import Groups, start_processes
from mf_train.parallel.processes import find_process
from mf_train.training.profile import Profile, _state_bytes, profile_path
from mf_train.training.profile_ranges import named_method, named_parts
from mf_train.training.profile_summary import GRADIENTS, OTHER
from tests.distributed import run_distributed
from tests.training.runs import (
    REPOSITORY,
    complaints,
    environment,
    read_metrics,
    small_config,
    train,
    write_text,
)

PROFILED = ("training.profile.start=3", "training.profile.steps=2")
SAME = ("step", "loss", "grad_norm", "batch_digest", "validation_loss")
MEMORY_LAYERS = ("norm_attention", "hash_attention", "lookup query key value", "attention", "norm_ffn")
MEMORY_LAYERS += ("hash_ffn", "up", "norm_inner", "hash_inner", "down")
DENSE_LAYERS = ("norm_attention", "query", "key", "value", "attention", "output", "norm_ffn", "up", "down")
AROUND = ("embedding", "final norm", "head and loss")
LOOP = (
    "read batch",
    "agree on batch",
    "share batch",
    "gradient norm",
    "optimizer",
    "report",
    "save",
    "validate",
)


def tree_of(folder: Path, kind: str) -> dict[str, Any]:
    tree = small_config(folder / "run", write_text(folder / "text.jsonl"))
    tree["model"]["kind"] = kind
    tree["training"] |= {"steps": 6, "validation_interval": 4}
    tree["checkpoint"] = {"interval": 3, "keep": 0}
    return tree


def summary_of(folder: Path, step: int = 3, rank: int = 0) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(profile_path(folder, step, rank, "summary.json").read_text())
    return summary


def names_in_trace(folder: Path, step: int = 3, rank: int = 0) -> list[str]:
    path = profile_path(folder, step, rank, "trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "user_annotation"]


def same(folder: Path) -> list[list[Any]]:
    return [[entry.get(key) for key in SAME] for entry in read_metrics(folder)]


def profile_run(tree: dict[str, Any], processes: int) -> Path:
    """A run whose steps 3 and 4 are profiled on all ranks."""
    ranks = f"training.profile.ranks={list(range(processes))}"
    done = train(tree, f"parallel.tensor={processes}", *PROFILED, ranks, processes=processes)
    run = Path(tree["training"]["output_dir"])
    for rank in range(processes):
        assert f"profile of steps 3 to 4: {profile_path(run, 3, rank, 'summary.txt')}" in done.stdout
    return run


@pytest.fixture(
    scope="module",
    params=[
        ("memoryformer", 1),
        ("dense", 1),
        pytest.param(("memoryformer", 2), marks=pytest.mark.distributed),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def profiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, int]:
    kind, processes = request.param
    return profile_run(tree_of(tmp_path_factory.mktemp("profiled"), kind), processes), kind, processes


def test_losses_do_not_feel_it(profiled: tuple[Path, str, int], tmp_path: Path) -> None:
    """And a run without a profile imports nothing of it."""
    run, kind, processes = profiled
    tree = tree_of(tmp_path, kind)
    if processes > 1:
        train(tree, f"parallel.tensor={processes}", processes=processes)
    else:
        modules = train_and_list_modules(tree)
        assert "mf_train.training.run" in modules
        assert not [name for name in modules if "profile" in name]
    assert len(same(run)) == 6 and same(run) == same(tmp_path / "run")
    assert not (tmp_path / "run" / "profile").exists()


def train_and_list_modules(tree: dict[str, Any]) -> list[str]:
    """This package's modules that a run in one process has imported."""
    path = Path(tree["training"]["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    code = (
        "import atexit, sys; from mf_train.cli import main;"
        "atexit.register(lambda: print('\\n'.join(name for name in sys.modules if 'mf_train.' in name)));"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_rank_writes_its_files_whole(profiled: tuple[Path, str, int]) -> None:
    run, _, processes = profiled
    found = sorted(path.name for path in (run / "profile").iterdir())
    assert found == [
        f"step-000000003-rank-{rank:05d}.{kind}"
        for rank in range(processes)
        for kind in ("summary.json", "summary.txt", "trace.json.gz")
    ]
    for rank in range(processes):
        summary = summary_of(run, rank=rank)
        assert [summary[key] for key in ("first_step", "steps", "rank", "device")] == [3, 2, rank, "cpu"]


def test_parts_are_the_whole(profiled: tuple[Path, str, int]) -> None:
    run, kind, processes = profiled
    steps = [entry for entry in read_metrics(run) if entry["step"] in (3, 4)]
    layer_parts = MEMORY_LAYERS if kind == "memoryformer" else DENSE_LAYERS
    for rank in range(processes):
        summary = summary_of(run, rank=rank)
        parts, layers = summary["parts"], summary["layers"]
        assert sum(used["cpu_seconds"] for used in parts.values()) == pytest.approx(summary["cpu_seconds"])
        # the loop's own clock leaves out what follows a step's metrics, such as validation and saving
        assert summary["cpu_seconds"] > sum(entry["step_seconds"] for entry in steps)
        assert {
            *layer_parts,
            *AROUND,
            *LOOP,
            "layer",
            "forward",
            "backward",
            GRADIENTS,
            OTHER,
        } <= parts.keys()
        assert len(layers) == 2
        for name in (*layer_parts, "layer"):
            total = sum(layer[name]["cpu_seconds"] for layer in layers)
            assert parts[name]["cpu_seconds"] == pytest.approx(total)
            assert 0 < parts[name]["backward_cpu_seconds"] < parts[name]["cpu_seconds"], name
            assert [layer[name]["calls"] for layer in layers] == [8, 8]  # 4 micro-batches of 2 steps
        for name in AROUND:
            assert parts[name]["calls"] == 8 and parts[name]["backward_cpu_seconds"] > 0
        assert (
            parts["validate"]["calls"] == parts["save"]["calls"] - 2 == 1
        )  # `save` is also looked after each step
        assert parts["optimizer"]["calls"] == parts[OTHER]["calls"] == 2
        assert parts[OTHER]["cpu_seconds"] < 0.1 * summary["cpu_seconds"]


def test_the_trace_names_both_passes_of_every_layer(profiled: tuple[Path, str, int]) -> None:
    run, kind, processes = profiled
    for rank in range(processes):
        names = names_in_trace(run, rank=rank)
        for layer in range(2):
            for part in MEMORY_LAYERS if kind == "memoryformer" else DENSE_LAYERS:
                assert names.count(f"layer {layer} / {part}") == 8
                assert names.count(f"layer {layer} / {part} (backward)") >= 8
            assert f"layer {layer} / {GRADIENTS} (backward)" in names
        assert [names.count(f"step {step}") for step in range(2, 6)] == [0, 1, 1, 0]


@pytest.mark.distributed
def test_recomputed_passes_are_named_too(tmp_path: Path) -> None:
    """What runs again in the backward pass has the name of its part; losses are those of a plain run."""
    tree = tree_of(tmp_path, "memoryformer")
    tree["training"]["recompute"] = "block"
    run = profile_run(tree, 2)
    for rank in range(2):
        summary, names = summary_of(run, rank=rank), names_in_trace(run, rank=rank)
        for layer, parts in enumerate(summary["layers"]):
            assert [parts[name]["calls"] for name in ("layer", *MEMORY_LAYERS)] == [8, *[16] * 10]
            assert names.count(f"layer {layer} / down (backward)") >= 8
        assert summary["parts"][OTHER]["cpu_seconds"] < 0.1 * summary["cpu_seconds"]
    plain = tmp_path / "plain"
    train(tree, "training.recompute=none", f"training.output_dir={plain}", "parallel.tensor=2", processes=2)
    assert same(run) == same(plain)


def test_memory_at_the_peak_by_part(profiled: tuple[Path, str, int]) -> None:
    run, kind, _ = profiled
    memory = summary_of(run)["memory"]
    assert sum(memory["peak_by_part"].values()) == memory["peak_bytes"] > memory["left_bytes"]
    state = memory["state"]
    if kind == "dense":
        model = MemoryFormer(ModelConfig(**tree_of(run.parent, kind)["model"]))
        assert state["parameters"] == 4 * sum(p.numel() for p in model.parameters())
    assert 2 * state["parameters"] <= state["moments"] < 2.1 * state["parameters"]
    assert state["parameters"] <= state["gradients"] < 1.05 * state["parameters"]
    assert memory["process_peak_bytes"] > 10**8


def gradient_bytes(rank: int, ranks: int) -> list[float]:
    """Bytes an element that each stage keeps of gradients after a step."""
    cpu, model = torch.device("cpu"), ModelConfig(hidden_size=32, num_layers=1, num_heads=2, vocab_size=64)
    start_processes(find_process(), cpu, 60)
    groups, found = Groups(Degrees(rank, ranks, 1), 60), []
    tokens = torch.zeros(2, 9, dtype=torch.long)
    for stage in range(4):
        parallel = ParallelConfig(zero_stage=stage)
        config = Config(model=model, parallel=parallel, training=TrainingConfig(precision="bfloat16"))
        engine = Engine(MemoryFormer(model), config, groups, cpu)
        backward_passes(engine, [tokens] * engine.micro_batches, 4)
        engine.update(1e-3)
        size = sum(engine.local_shape(parameter).numel() for parameter in engine.model.parameters())
        found.append(_state_bytes(engine)["gradients"] / size)
        engine.close()
    return found


@pytest.mark.distributed
def test_sums_of_gradients_are_float32_of_what_a_stage_keeps() -> None:
    """Stage 1 keeps its own and a shard of all ranks'; stages 2 and 3 the shard alone."""
    for found in run_distributed(gradient_bytes, 2):
        assert found == pytest.approx([4, 6, 2, 2], rel=0.05)


@pytest.mark.parametrize("profiled", [("memoryformer", 1)], indirect=True, ids=["memoryformer-1"])
def test_a_run_that_goes_on_profiles_what_is_left(profiled: tuple[Path, str, int], tmp_path: Path) -> None:
    """From a checkpoint of a run that was profiled otherwise, in the middle of the steps that are asked for."""
    run, kind, _ = profiled
    before = run / "checkpoints" / step_name(3)
    steps = ("training.profile.start=2", "training.profile.steps=3")
    done = train(tree_of(tmp_path, kind), f"checkpoint.resume={before}", *steps)
    assert f"profile of step 4: {profile_path(tmp_path / 'run', 4, 0, 'summary.txt')}" in done.stdout
    summary = summary_of(tmp_path / "run", step=4)
    assert (summary["first_step"], summary["steps"]) == (4, 1)
    assert same(tmp_path / "run") == same(run)[3:]


def test_a_run_that_is_past_them_says_so() -> None:
    config = Config(training=TrainingConfig(profile=ProfileConfig(start=3, steps=2, ranks=(0, 1))))
    for rank in range(3):
        engine: Any = SimpleNamespace(groups=SimpleNamespace(degrees=Degrees(rank, 3, 1)))
        said: list[str] = []
        profile = Profile(config, engine, 3, [], said.append, lambda: None)
        assert not said and list(profile.steps) == ([3, 4] if rank < 2 else [])
        Profile(config, engine, 4, [], said.append, lambda: None)
        words = (
            "training.profile asks for steps 3 to 4 and this run goes on after step 4: nothing is profiled"
        )
        assert said == ([f"warning: {words}"] if rank == 0 else [])


def test_the_run_goes_on_where_a_profile_cannot_be_written(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, "memoryformer")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").write_text("in the way")
    done = train(tree, *PROFILED)
    (line,) = [line for line in done.stdout.splitlines() if "the profile of" in line]
    assert line.startswith("warning: the profile of steps 3 to 4 is not complete: ")
    assert str(tmp_path / "run" / "profile") in line
    assert len(read_metrics(tmp_path / "run")) == 6


def test_a_rank_that_is_not_there_is_refused(tmp_path: Path) -> None:
    done = train(tree_of(tmp_path, "dense"), *PROFILED, "training.profile.ranks=[0, 4]", expect=2)
    assert complaints(done) == [
        "memoryformer: training.profile.ranks names rank 4 and the run has ranks 0 to 0 (1 processes): name some of "
        "these"
    ]
    assert not (tmp_path / "run").exists()


class Passes:
    """What `named_parts` needs of an engine, on one process."""

    def __init__(self, model: MemoryFormer) -> None:
        self.model = model

    def backward(self, tokens: torch.Tensor) -> torch.Tensor:
        loss = self.model(tokens[:, :-1], tokens[:, 1:]).mean()
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("kind", ["memoryformer", "dense"])
def test_nothing_is_left_behind(kind: str) -> None:
    config = ModelConfig(kind=kind, hidden_size=32, num_layers=2, num_heads=4, bits=4, vocab_size=64)  # type: ignore[arg-type]
    engine: Any = Passes(MemoryFormer(config, seed=1))
    tokens = torch.randint(64, (2, 9))
    before, names = vars(engine).copy(), list(engine.model.state_dict())
    plain = engine.backward(tokens)
    gradients = [p.grad.clone() for p in engine.model.parameters()]
    engine.model.zero_grad()
    with named_parts(engine), named_method(engine, "backward", "all of it"):
        hooked = [m for m in engine.model.modules() if m._forward_hooks or m._forward_pre_hooks]
        assert len(hooked) > 10
        assert torch.equal(engine.backward(tokens), plain)
        engine.model(tokens)  # another pass, in which no range is opened
    assert all(map(torch.equal, gradients, (p.grad for p in engine.model.parameters())))
    assert not [m for m in engine.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert vars(engine) == before and list(engine.model.state_dict()) == names
