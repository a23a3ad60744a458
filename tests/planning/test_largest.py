"""The largest size that a memory trains, against bytes that are counted here by hand on built models."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from mf_train.cli import main
from mf_train.config import Config, ModelConfig
from mf_train.config.loading import load_config
from mf_train.model import MemoryFormer
from mf_train.model.counts import count_parameters
from mf_train.planning.devices import find_device
from mf_train.planning.ladder import shared_size
from mf_train.planning.largest import COLUMNS, DEPTHS, find_largest, parse_memories

BASE = Path(__file__).resolve().parents[2] / "configs" / "base.yaml"
# Activations and logits are next to nothing, so that the states decide.
SHORT = ("training.micro_batch_size=1", "model.sequence_length=16", "model.vocab_size=64")


def states(depth: int, column: str, tensor: int) -> float:
    """Bytes a rank of P = `tensor`, R = 1 holds, in bfloat16: weights, sums of gradients, masters, moments."""
    model = ModelConfig(
        hidden_size=64 * depth, num_layers=depth, num_heads=depth, vocab_size=64, sequence_length=16
    )
    with torch.device("meta"):
        named = dict(MemoryFormer(model).named_parameters())
    # all but the head's matrix, norms and biases; int8 has a float32 for each unit, an eighth of a row
    tables = sum(p.numel() for name, p in named.items() if p.dim() == 3 or "embedding" in name)
    others = sum(p.numel() for p in named.values()) - tables
    units = sum(
        p.numel() / p.shape[-1] * 8 for name, p in named.items() if p.dim() == 3 or "embedding" in name
    )
    whole = tables + others
    if column == "as it stands":
        return (2 + 4 + 4 + 8) * whole / tensor
    if column == "same results":
        return (2 + 4 + 2 + 8) * whole / tensor
    if column == "int8 and row":
        return ((2 + 4 + 2) * whole + tables + 2 * 4 * units + 8 * others) / tensor
    return (2 + 4) * whole / tensor


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("tensor", [1, 8])
def test_a_size_is_the_last_whose_states_fit(column: str, tensor: int) -> None:
    """R = 1, so ZeRO has nothing to share. Memories lie a third of the way to the next size's states and further."""
    config = load_config(BASE, SHORT)
    depth = random.randrange(32, 64, 2)
    least, next_least = states(depth, column, tensor), states(depth + 2, column, tensor)
    share = random.uniform(0.4, 0.95)
    memory = (1e9 + least + share * (next_least - least)) / 0.92  # a gigabyte is the GPU's own
    rows = {row.tensor: row for row in find_largest(config, 1, tensor, {"some": memory})}
    size = rows[tensor].sizes[column]
    assert rows[tensor].data == 1 and size is not None
    assert (size.config.model.num_layers, size.config.model.hidden_size) == (depth, 64 * depth)
    assert size.parameters == sum(p.numel() for p in built(size.config).parameters())
    assert size.memory.peak == pytest.approx(1e9 + least, rel=0.07)
    if (
        column == "offload"
    ):  # a gradient's copy, a master, and moments of the column before; a copy to save beside the steps
        saved = 2 + 2 + (states(depth, "int8 and row", tensor) * tensor / size.parameters - 8)
        moved = states(depth, "int8 and row", tensor) - states(depth, "offload", tensor)
        expected = moved + (2 + 4) * size.parameters / tensor
        assert size.memory.host == pytest.approx(expected + saved * size.parameters / tensor, rel=0.01)


def built(config: Config) -> MemoryFormer:
    with torch.device("meta"):
        return MemoryFormer(config.model)


def test_sizes_grow_with_memory_and_with_what_is_switched_on() -> None:
    config = load_config(BASE, ["training.micro_batch_size=1"])
    found = find_largest(config, 2, 8, parse_memories("24,48,h200"))
    assert [(row.memory, row.tensor, row.data) for row in found] == [
        (name, tensor, 16 // tensor) for name in ("24", "48", "h200") for tensor in (1, 8)
    ]
    for tensor in (1, 8):
        grid = [
            [size.parameters if size else 0 for size in row.sizes.values()]
            for row in found
            if row.tensor == tensor
        ]
        for line in (*grid, *zip(*grid, strict=True)):
            assert list(line) == sorted(line)
        assert grid[0][0] < grid[-1][0] and all(line[0] < line[-1] for line in grid)
    for row in found:
        for column, size in row.sizes.items():
            assert size is not None
            parallel, training = size.config.parallel, size.config.training
            on = COLUMNS.index(column)
            assert (training.recompute == "block") == (on >= 1)
            assert (size.config.optimizer.table_exp_avg == "int8") == (on >= 2)
            assert (parallel.offload == "optimizer") == (on >= 3)
            assert parallel.zero_stage == 1 if on == 0 else parallel.zero_stage in (2, 3)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    captured = capsys.readouterr()
    return end.value.code, captured.out, captured.err


def test_the_command_prints_a_table_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    given = (str(BASE), "training.micro_batch_size=1", "--largest", "1,80,mi300x", "--gpus-per-node", "4")
    code, out, _ = run(capsys, *given)
    head, _, *rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and head[3:-1] == list(COLUMNS)
    _, out, _ = run(capsys, *given, "--json")
    found: list[dict[str, Any]] = json.loads(out)
    assert [(row["memory"], row["tensor"], row["data"]) for row in found] == [
        (name, tensor, 4 // tensor) for name in ("1", "80", "mi300x") for tensor in (1, 4)
    ]
    assert len(found) == len(rows)
    for tree, row in zip(found, rows, strict=True):
        assert row[:3] == [str(tree[key]) for key in ("memory", "tensor", "data")]
        for text, size in zip(row[3:-1], tree["sizes"].values(), strict=True):
            assert (text == "-") == (size is None) and (size is None) == (tree["memory"] == "1")
            if size is not None:
                billions, layers, stage = re.fullmatch(r"([\d.]+) B, (\d+) L, Z(\d)", text).groups()  # type: ignore[union-attr]
                assert float(billions) == pytest.approx(size["parameters"] / 1e9, rel=5e-3)
                assert (int(layers), int(stage)) == (size["num_layers"], size["zero_stage"])
                assert size["peak"] <= 0.92 * (
                    80e9 if tree["memory"] == "80" else find_device("mi300x").memory
                )


def test_the_dense_peer_is_shared_too(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(BASE.with_name("dense-base.yaml"))
    _, out, _ = run(capsys, path, "--largest", "80", "--json")
    one, eight = json.loads(out)
    for way, size in one["sizes"].items():
        assert eight["sizes"][way]["parameters"] > size["parameters"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--largest", "24,4x"], "--largest 24,4x: 4x is no memory: give GB above 0 or GPUs"),
        (["--largest", "24,,48"], "--largest 24,,48: nothing is no memory"),
        (["--largest", "0"], "--largest 0: 0 is no memory"),
        (["--largest", "nan"], "--largest nan: nan is no memory"),
        (["--largest", "cpu"], "--largest cpu: cpu is no memory"),
        (["--largest", "24", "--device", "h100"], "--device does not go with --largest: leave it out"),
        (["--largest", "24", "--plot", "x.png"], "--plot does not go with --largest"),
        (
            ["--largest", "24", "--nodes", "9999"],
            "no size of the ladder can be trained: training.global_batch_size",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = run(capsys, str(BASE), *arguments)
    assert code == 2 and not out and words in error


def test_every_size_can_be_built_and_shared_by_8_ranks() -> None:
    sizes = [ModelConfig(**shared_size(depth)) for depth in DEPTHS]
    assert [size.num_layers for size in sizes] == list(range(2, 129, 2))
    for size in sizes:
        assert size.hidden_size == 64 * size.num_layers and size.num_heads % 8 == size.num_tables % 8 == 0
        assert size.head_size % 2 == 0 and size.head_size < 128
        assert size.head_size >= 64 or size.num_layers < 8
    counts = [count_parameters(size).total for size in sizes]
    assert counts == sorted(counts)
    assert (sizes[3].num_heads, sizes[7].num_heads) == (
        8,
        16,
    )  # the paper's tiny has 512 features, its base 1024
