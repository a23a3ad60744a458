"""The collectives that a process starts, counted as torch dispatches them: what a step sends, and when.

`python -m benchmarks.collectives` trains a small model (STEPS steps of 4 micro-batches) under each ZeRO stage, in each
precision, on 1, 2 and 4 data-parallel ranks of this machine and on 2 with two tensor-parallel ones each. It prints, of
a step of rank 0: collectives, bytes sent by dtype, the share of the gradients' bytes that went out before the backward
passes had ended, and seconds (the least of all steps). Ranks share the processors: seconds compare cases alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.tables import table

STEPS, MICRO_BATCHES = 4, 4
FEWEST = 8  # elements: smaller collectives are single numbers
LAYOUTS = ((1, 1), (1, 2), (1, 4), (2, 2))  # tensor- and data-parallel degrees
# c10d operators: the collective's name, which tensor is the whole, and how often it goes round the ring of R ranks
_KINDS = {
    "allreduce_": ("all_reduce", 2),
    "_allgather_base_": ("all_gather", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 1),
    "reduce_": ("reduce", 1),
}


@dataclass(frozen=True)
class Call:
    """A collective: its whole tensor, its group, and whether a backward pass was running when it started."""

    name: str
    dtype: str
    elements: int
    sent_bytes: float  # by a rank, as of a ring
    group: str
    during_backward: bool


class Collectives(TorchDispatchMode):
    """Within the block, records the collectives of this thread in `calls`. One that is not in `_KINDS` is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        namespace, _, rest = str(func).partition(".")
        name = rest.partition(".")[0]
        if namespace == "c10d":
            assert name in _KINDS, name
            self._note(name, args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: tuple[Any, ...]) -> None:
        name, passes = _KINDS[operator]
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        objects = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.ScriptObject)]
        group = next(filter(None, map(_group, objects)))
        ranks = group.size()
        whole = max(tensors, key=lambda tensor: tensor.numel())
        self.calls.append(
            Call(
                name,
                str(whole.dtype).removeprefix("torch."),
                whole.numel(),
                passes * whole.nbytes * (ranks - 1) / ranks,
                group.group_name,
                torch._C._current_graph_task_id() != -1,
            )
        )


def _group(boxed: torch.ScriptObject) -> ProcessGroup | None:
    try:
        return ProcessGroup.unbox(boxed)
    except (RuntimeError, TypeError, ValueError):  # another object of c10d's, a ReduceOp
        return None


def main() -> None:
    print(f"torch {torch.__version__}, {MICRO_BATCHES} micro-batches a step, parallel.overlap on")
    rows = []
    for tensor, data in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            ranks = f"--nproc-per-node={tensor * data}"
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks]
            command = [*launcher, "-m", "benchmarks.collectives", str(tensor), str(result)]
            subprocess.run(command, check=True)
            rows += [[f"{tensor} x {data}", *cells] for cells in json.loads(result.read_text())]
    print(table(["P x R", "stage", "precision", "collectives", "MB sent", "early", "seconds"], rows))


def run_rank(tensor: int, result: Path) -> None:
    from mf_train.parallel.degrees import Degrees
    from mf_train.parallel.groups import Groups, start_processes, stop_processes
    from mf_train.parallel.processes import find_process

    process = find_process()
    torch.set_num_threads(1)
    start_processes(process, torch.device("cpu"), 300)
    groups = Groups(Degrees(process.rank, process.world_size, tensor), 300)
    cells = list(_measure(groups))
    if process.rank == 0:
        result.write_text(json.dumps(cells))
    stop_processes()


def _measure(groups: Any) -> Iterator[list[str]]:
    from benchmarks.micro_batches import backward_passes
    from mf_train.config import Config, ModelConfig, ParallelConfig, TrainingConfig
    from mf_train.parallel.engine import Engine
    from mf_train.parallel.exchange import Exchange
    from mf_train.parallel.tensor import build_model

    degrees = groups.degrees
    model = ModelConfig(
        hidden_size=192, num_layers=3, num_heads=4, bits=6, vocab_size=4096, sequence_length=128
    )
    for stage in (0, 1, 2, 3):
        for precision in ("float32", "bfloat16"):
            config = Config(
                model=model,
                parallel=ParallelConfig(tensor=degrees.tensor, zero_stage=stage, bucket_size=500_000),
                training=TrainingConfig(
                    global_batch_size=MICRO_BATCHES * degrees.data,
                    micro_batch_size=1,
                    precision=precision,  # type: ignore[arg-type]
                ),
            )
            exchange = Exchange(groups.tensor) if degrees.tensor > 1 else None
            engine = Engine(
                build_model(model, exchange, 0, torch.device("cpu")), config, groups, torch.device("cpu")
            )
            micro_batches = [torch.randint(model.vocab_size, (1, model.sequence_length + 1))] * MICRO_BATCHES
            seconds, calls = [], []
            for _ in range(STEPS):
                began = time.perf_counter()
                with Collectives() as collectives:
                    backward_passes(engine, micro_batches, config.training.global_batch_size)
                    engine.update(1e-4)
                seconds.append(time.perf_counter() - began)
                calls = collectives.calls
            engine.close()
            yield [str(stage), precision, *_summary(calls, groups.data.group_name), f"{min(seconds[1:]):.3f}"]


def _summary(calls: list[Call], group: str) -> list[str]:
    """Collectives of the data-parallel group, bytes by dtype, and the share of gradients that went early."""
    data = [call for call in calls if call.group == group and call.sent_bytes and call.elements > FEWEST]
    kinds = Counter(call.name for call in data)
    sent: Counter[str] = Counter()
    for call in data:
        sent[call.dtype] += round(call.sent_bytes)
    reductions = [call for call in data if call.name in ("reduce_scatter", "all_to_all")]
    reduced = sum(call.sent_bytes for call in reductions)
    early = sum(call.sent_bytes for call in reductions if call.during_backward)
    return [
        ", ".join(f"{count} {name}" for name, count in sorted(kinds.items())) or "none",
        ", ".join(f"{size / 1e6:.1f} {dtype}" for dtype, size in sorted(sent.items())) or "0",
        f"{early / reduced:.0%}" if reduced else "-",
    ]


if __name__ == "__main__":
    if sys.argv[1:]:
        run_rank(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        main()
