"""A real run of two ranks, one of which stops in the middle of a step, of the backward pass or of a save."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import REPOSITORY, environment, small_config, write_config, write_text
from tests.warm import _run, free_port, start_warm

LIMIT = 15  # seconds; a start on a busy machine must not stand still so long

# What the line says of the rank: how far it has come in the collectives of the tensor-parallel group, or of a save.
LAGS = {
    "step": r"training step \d+ for \d+ s, has started collective \d+ \(.*\), others collective \d+ "
    r"\(tensor-parallel all-gather\)",
    "backward": r"training step \d+ for \d+ s, has started collective \d+ \(.*\), others collective \d+ "
    r"\(tensor-parallel all-to-all\)",
    "save": r"(writing|saving|starting to save) .*",
}


def stop_in(where: str) -> None:
    """From now on this process stands still for long at this place, once some steps are over."""
    from mf_train.parallel.exchange import Exchange

    calls = {"step": "all_gather", "backward": "reduce_scatter"}
    if where in calls:
        original, seen = getattr(Exchange, calls[where]), 0

        def stopping(self: Exchange, *arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > 100:  # some steps of two layers
                time.sleep(600)
            return original(self, *arguments)

        setattr(Exchange, calls[where], stopping)
    else:

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and ".partial-" in str(arguments[0]):
                time.sleep(600)

        sys.addaudithook(hook)


def rank_of_a_run(where: str, arguments: list[str], variables: dict[str, str], outputs: list[Path]) -> None:
    if variables["RANK"] == "1":
        stop_in(where)
    _run(arguments, variables, str(REPOSITORY), outputs)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("where", LAGS)
def test_the_rank_that_stops_is_named(where: str, tmp_path: Path) -> None:
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["training"] |= {"steps": 1000, "collective_timeout_seconds": LIMIT}
    tree |= {"parallel": {"tensor": 2}, "checkpoint": {"interval": 5 if where == "save" else 0}}
    variables = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    variables |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
    outputs = [tmp_path / "output", tmp_path / "errors"]
    for path in outputs:
        path.touch()
    ranks = []
    for rank in range(2):
        own = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(start_warm(rank_of_a_run, where, ["train", write_config(tree)], own, outputs))
    try:
        for process in ranks:
            process.join(180)
        assert [process.exitcode for process in ranks] == [1, 1], outputs[1].read_text()
    finally:
        for process in ranks:
            process.kill()
    said = [line for line in outputs[1].read_text().splitlines() if line.startswith("memoryformer: no ")]
    assert len(said) == 1
    line = rf"memoryformer: no progress for \d+ s: rank 1 on \S+ has been {LAGS[where]}; .*run the same command again.*"
    assert re.fullmatch(line, said[0]), said[0]
    stacks = tmp_path / "run" / "stacks"
    assert sorted(os.listdir(stacks)) == ["collectives-0", "collectives-1", "rank-0.txt", "rank-1.txt"]
    assert b"all_gather" in (stacks / "collectives-1").read_bytes()
