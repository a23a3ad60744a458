"""One rank that measures its memory while it trains, for `benchmarks.plan_memory`.

`python -m benchmarks.rank_memory FOLDER CONFIG... [--trace]`, with torchrun's variables where it is one of several
ranks. Trains each configuration, one after the other, and writes FOLDER/RANK.json: of each, by its file's name without
suffix, the resident bytes above those before the model was built, their peak in the first and in later steps, and the
seconds of each step. With `--trace` it also prints resident bytes and their peak after each backward pass and each
update.
"""

import ctypes
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import reset_peak, status
from mf_train.config import Config
from mf_train.parallel.processes import Process, find_process

STEPS = 2


def main(folder: str, *words: str) -> None:
    import torch

    from mf_train.config.loading import load_config
    from mf_train.parallel.groups import start_processes, stop_processes

    process = find_process()
    start_processes(process, torch.device("cpu"), 600)
    _warm_up()
    paths = [Path(word) for word in words if word != "--trace"]
    found = {}
    for path in paths:
        found[path.stem] = _measure(load_config(path), process, "--trace" in words)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        (Path(folder) / f"{process.rank}.json").write_text(json.dumps(found))
    stop_processes()


def _measure(config: Config, process: Process, trace: bool) -> dict[str, Any]:
    import torch

    from benchmarks.micro_batches import backward_passes
    from mf_train.model import MemoryFormer
    from mf_train.parallel.degrees import Degrees
    from mf_train.parallel.engine import Engine
    from mf_train.parallel.exchange import Exchange
    from mf_train.parallel.groups import Groups
    from mf_train.parallel.recompute import recompute_blocks
    from mf_train.parallel.tensor import shard_model
    from mf_train.parallel.zero3 import import_deepspeed

    cpu = torch.device("cpu")
    groups = Groups(Degrees(process.rank, process.world_size, config.parallel.tensor), 600)
    exchange = Exchange(groups.tensor) if config.parallel.tensor > 1 else None
    if config.parallel.zero_stage == 3:
        import_deepspeed(cpu, process.local_rank)
    start = status("VmRSS")
    with torch.device("meta"):
        model = MemoryFormer(config.model)
    if exchange is not None:
        shard_model(model, exchange)
    if config.training.recompute == "block":
        recompute_blocks(model, exchange)
    model.to_empty(device=cpu)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    found: dict[str, Any] = {"peaks": [], "seconds": [], "ends": []}
    reset_peak()
    engine = Engine(model, config, groups, cpu)
    found["built"], found["build_peak"] = status("VmRSS") - start, status("VmHWM") - start
    micro, length = config.training.micro_batch_size, config.model.sequence_length
    micro_batches = [torch.randint(config.model.vocab_size, (micro, length + 1))] * engine.micro_batches
    note = _trace if trace else lambda name: None
    for _ in range(STEPS):
        reset_peak()
        began = time.perf_counter()
        backward_passes(engine, micro_batches, config.training.global_batch_size, lambda: note("backward"))
        engine.update(1e-4)
        note("update")
        found["seconds"].append(time.perf_counter() - began)
        found["peaks"].append(status("VmHWM") - start)
        found["ends"].append(status("VmRSS") - start)
    engine.close()
    return found


def _warm_up() -> None:
    """Have torch load what its operations need, so that this is not counted as the first model's.

    Its first operator of ours loads torch._dynamo and what is built on the meta device loads sympy: 160 MB.
    """
    import torch

    from mf_train.kernels import hash_codes

    x = torch.randn(64, 64, requires_grad=True)
    (x @ x).softmax(-1).sum().backward()
    _, weights = hash_codes(x, 8)
    weights.sum().backward()
    torch.nn.Linear(2, 2, device="meta").to_empty(device="cpu")


def _trace(name: str) -> None:
    print(name, "rss", status("VmRSS") / 1e6, "peak", status("VmHWM") / 1e6, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
