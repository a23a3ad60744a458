"""What a checkpoint says of the stream when a batch could not be read ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TrainingConfig
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import TokenIds
from mf_train.errors import PeerError
from mf_train.parallel.groups import start_processes
from mf_train.parallel.processes import find_process
from mf_train.training.batches import SharedBatches
from tests.distributed import run_distributed
from tests.parallel.worlds import make_groups

CPU = torch.device("cpu")
SEQUENCE, BATCH, STREAMS, FAILING = 7, 8, 4, 3  # every stream is read at every step


def states(rank: int, world_size: int, prefix: str, failing_rank: int) -> dict[int, Any]:
    """The state of a checkpoint after each step up to the one whose successor `failing_rank` cannot read."""
    start_processes(find_process(), CPU, timeout_seconds=60)
    config = Config(
        model=ModelConfig(sequence_length=SEQUENCE, vocab_size=512),
        data=DataConfig(train=(SourceConfig(path=prefix),), logical_streams=STREAMS, workers=0),
        training=TrainingConfig(global_batch_size=BATCH),
    )
    stream = TokenStream(config.data, TokenIds(512, 0), SEQUENCE, BATCH, rank, world_size)
    ended = []
    batches = SharedBatches(
        stream,
        config,
        make_groups(find_process(), 1),
        CPU,
        first=1,
        stop=lambda: False,
        before_failing=lambda: ended.append(True),
        entering=lambda what: None,
    )
    assert batches.reader is not None
    made = batches.reader._maker.next_batch
    reads: list[int] = []

    def next_batch(*given: Any) -> Any:
        reads.append(0)
        if rank == failing_rank and len(reads) == FAILING:
            raise OSError("the file system has gone")
        return made(*given)

    batches.reader._maker.next_batch = next_batch  # type: ignore[method-assign]
    found = {}
    try:
        for step in range(1, FAILING + 1):
            batches.next(step)
            batches.look_ahead(step + 1)
            batches.agree(torch.zeros(1), torch.zeros(1))
            found[step] = batches.state(step)
    except (OSError, PeerError):
        assert ended
    finally:
        batches.close()
    return found


@pytest.mark.distributed
def test_a_read_ahead_that_failed_takes_back_no_batch(tmp_path: Path) -> None:
    """Each rank's streams are where the trained batches left them, those of the rank that failed too."""
    numbers = np.random.default_rng(0)
    with TokenShardWriter(tmp_path / "shard", "uint16") as writer:
        for length in numbers.integers(3, 40, 300):
            writer.add([*numbers.integers(1, 500, length), 0])
        writer.finish()
    prefix = str(tmp_path / "shard")
    whole, _ = run_distributed(states, 2, prefix, -1)
    for failing_rank in (0, 1):
        found, _ = run_distributed(states, 2, prefix, failing_rank)
        assert list(found) == list(range(1, FAILING))
        assert all(found[step] == whole[step] for step in found)
    assert whole[FAILING - 1] != whole[FAILING - 2]
