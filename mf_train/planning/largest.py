"""The largest size of the ladder that memories of so many GB can train."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mf_train.config import Config
from mf_train.errors import UserError
from mf_train.model.counts import count_parameters
from mf_train.parallel.degrees import check_degrees
from mf_train.planning.device_memory import RankMemory, estimate_memory, heaviest_phase
from mf_train.planning.devices import find_device
from mf_train.planning.ladder import WIDTH, shared_size
from mf_train.planning.plan import USABLE, with_values

DEPTHS = range(2, 129, 2)
# What docs/memory.md switches on, each beside what stands before it; the ZeRO stage is the one of the least memory
STEPS: dict[str, dict[str, dict[str, Any]]] = {
    "same results": {
        "training": {"micro_batch_size": 1, "recompute": "block"},
        "parallel": {"master": "split"},  # where it can be
    },
    "int8 and row": {"optimizer": {"table_exp_avg": "int8", "table_exp_avg_sq": "row"}},
    "offload": {"parallel": {"offload": "optimizer"}},
}
COLUMNS = ("as it stands", *STEPS)


@dataclass(frozen=True)
class Size:
    """A size of the ladder, and what it needs."""

    config: Config
    memory: RankMemory

    @property
    def parameters(self) -> int:
        return count_parameters(self.config.model).total

    def to_tree(self, per_node: int) -> dict[str, Any]:
        """Plain values for JSON, in bytes; `host_per_node`: of a node's memory."""
        model, parallel = self.config.model, self.config.parallel
        return {
            "parameters": self.parameters,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "zero_stage": parallel.zero_stage,
            "peak": round(self.memory.peak),
            "host_per_node": round(self.memory.host * per_node),
        }


@dataclass(frozen=True)
class Largest:
    """Of one memory and P the largest size in each of COLUMNS; None where the smallest does not fit."""

    memory: str  # as it was given
    tensor: int
    data: int
    sizes: dict[str, Size | None]


def parse_memories(text: str) -> dict[str, float]:
    """Bytes by what was given: "24,80,h200", numbers of GB (10^9 bytes) or GPUs of devices.yaml. Raises UserError."""
    return {word: _parse_memory(word, text) for word in text.split(",")}


def _parse_memory(word: str, text: str) -> float:
    try:
        memory = 1e9 * float(word)
    except ValueError:
        with suppress(UserError):
            device = find_device(word)
            if device.kind == "cuda":
                return device.memory
        memory = 0
    if not 0 < memory < float("inf"):
        raise UserError(
            f"--largest {text}: {word or 'nothing'} is no memory: give GB above 0 or GPUs, such as 24,80,h200"
        )
    return memory


def find_largest(config: Config, nodes: int, per_node: int, memories: dict[str, float]) -> list[Largest]:
    """For each memory a row of P = 1 and one of the largest P of a node. Raises UserError where no size can be built.

    A size fits where the predicted peak of a GPU's rank is within USABLE of the memory.
    """
    config = heaviest_phase(config, nodes * per_node, "cuda").config
    found, ladders, problems = [], {}, []
    for tensor in sorted({1, max(tensor for tensor in (1, 2, 4, 8) if per_node % tensor == 0)}):
        ladders[tensor], problem = _ladder(config, tensor, nodes * per_node)
        problems.append(problem)
    if not any(rungs for ladder in ladders.values() for rungs in ladder.values()):
        raise UserError(f"--largest: no size of the ladder can be trained: {problems[0]}")
    for name, memory in memories.items():
        for tensor, ladder in ladders.items():
            sizes = {
                column: max(
                    (size for size in rungs if size.memory.peak <= USABLE * memory),
                    key=lambda size: size.parameters,
                    default=None,
                )
                for column, rungs in ladder.items()
            }
            found.append(Largest(name, tensor, nodes * per_node // tensor, sizes))
    return found


def _ladder(config: Config, tensor: int, processes: int) -> tuple[dict[str, list[Size]], str]:
    """In each column all sizes that can be built and that the degrees allow, and why the last other one cannot."""
    config = with_values(config, parallel={"tensor": tensor})
    columns = {COLUMNS[0]: [config]}
    for name, keys in STEPS.items():
        config = with_values(config, **keys)
        columns[name] = []
        for stage in (0, 1, 2, 3):
            # in float32 masters are the weights themselves, and stage 3 has masters of its own
            split = config.training.precision == "bfloat16" and stage < 3
            parallel = {"zero_stage": stage, "master": "split" if split else "float32"}
            columns[name].append(with_values(config, parallel=parallel))
    found: dict[str, list[Size]] = {column: [] for column in columns}
    problem = ""
    for depth in DEPTHS:
        for column, candidates in columns.items():
            sizes = []
            for candidate in candidates:
                try:
                    sized = with_values(candidate, model=shared_size(depth))
                    check_degrees(sized, processes)
                except (ValueError, UserError) as error:
                    problem = str(error)
                    continue
                sizes.append(Size(sized, estimate_memory(sized, processes)))
            if sizes:
                found[column].append(min(sizes, key=lambda size: size.memory.peak))
    return found, problem


def largest_tree(found: Sequence[Largest], per_node: int) -> list[dict[str, Any]]:
    """The rows for JSON."""
    return [
        {
            "memory": row.memory,
            "tensor": row.tensor,
            "data": row.data,
            "sizes": {column: size and size.to_tree(per_node) for column, size in row.sizes.items()},
        }
        for row in found
    ]


def largest_lines(path: str, per_node: int, found: Sequence[Largest]) -> Iterator[str]:
    """A table in Markdown, and what its columns mean."""
    yield f"{path}: the largest model whose predicted peak is within {USABLE:.0%} of a GPU's memory; nothing was run"
    yield f"sizes: d layers of {WIDTH} d features, d = 2, 4 to {DEPTHS[-1]}"
    yield "a cell: billions of parameters, layers (L), ZeRO stage (Z); -: the smallest size does not fit or divide"
    yield f"{COLUMNS[0]}: all but size and P as configured"
    for name, keys in STEPS.items():
        words = [
            f"{section}.{key}={value}" for section, values in keys.items() for key, value in values.items()
        ]
        yield f"{name}: and {' '.join(words)}"
    yield "after the first column the ZeRO stage of the least memory, in stage 3 with float32 masters"
    yield ""
    yield f"| GB | P | R | {' | '.join(COLUMNS)} | the last's host GB a node |"
    yield "|---" * (4 + len(COLUMNS)) + "|"
    for row in found:
        last = row.sizes[COLUMNS[-1]]
        host = f"{last.memory.host * per_node / 1e9:,.0f}" if last else "-"
        cells = [row.memory, str(row.tensor), str(row.data), *map(_cell, row.sizes.values()), host]
        yield f"| {' | '.join(cells)} |"


def _cell(size: Size | None) -> str:
    if size is None:
        return "-"
    return (
        f"{size.parameters / 1e9:.3g} B, {size.config.model.num_layers} L, Z{size.config.parallel.zero_stage}"
    )
