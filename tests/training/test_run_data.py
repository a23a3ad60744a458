"""Whole runs on other data than one good file: token shards alone, damaged files, workers that die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mf_train.config import Config, DataConfig, SourceConfig
from mf_train.data.shards.shard import TokenShardWriter
from mf_train.data.sources import open_source
from mf_train.data.stream.digest import batch_digest
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import TokenIds, Tokenizer
from mf_train.errors import PeerError, UserError
from mf_train.parallel.groups import start_processes
from mf_train.parallel.processes import find_process
from mf_train.training.inputs import check_same_sources
from tests.distributed import run_distributed
from tests.training.runs import (
    TOKENIZER,
    complaints,
    has_steps,
    read_metrics,
    run_command,
    small_config,
    start,
    train,
    wait_for,
    write_text,
)
from tests.warm import Running


def write_shard(prefix: Path, text: Path) -> str:
    """The documents of a JSONL file as a token shard without ends of text: Megatron's default."""
    tokenizer = Tokenizer(TOKENIZER)
    writer = TokenShardWriter(prefix, "uint16")
    for line in text.read_text().splitlines():
        writer.add(tokenizer.encode(json.loads(line)["text"]))
    writer.finish()
    return str(prefix)


def test_token_shards_of_another_tokenizer_train_and_convert(tmp_path: Path) -> None:
    """Two tensor-parallel ranks, of which one reads; the same batches as in one process, and as on the text."""
    text = write_text(tmp_path / "text.jsonl")
    prefix = write_shard(tmp_path / "shard", text)
    tree = small_config(tmp_path / "run", text)
    tree["data"] = {"train": [{"path": prefix}], "validation": [{"path": prefix}], "logical_streams": 8}
    tree["data"]["document_attention"] = True
    tree["tokenizer"] = {"end_of_text_id": 0}
    tree["training"] |= {"steps": 3, "validation_interval": 3}
    train(tree, "parallel.tensor=2", processes=2)
    metrics = read_metrics(tmp_path / "run")
    digests = [entry["batch_digest"] for entry in metrics]
    for path, tokenizer in ((prefix, TokenIds(4096, 0)), (str(text), Tokenizer(TOKENIZER))):
        data = DataConfig(train=(SourceConfig(path=path),), logical_streams=8)
        stream = TokenStream(data, tokenizer, 32, 8)
        assert digests == [batch_digest(stream.next_batch()) for _ in range(3)]
    assert metrics[-1]["validation_loss"] < 9 and 0 <= metrics[0]["epochs"][0] < metrics[-1]["epochs"][0] < 1

    model = tmp_path / "model"
    done = run_command(["convert", str(tmp_path / "run"), str(model)])
    assert done.returncode == 0, done.stderr
    assert "no tokenizer: the run had only token ids" in done.stdout
    settings = json.loads((model / "config.json").read_text())
    assert settings["eos_token_id"] == 0 and settings["document_attention"] is True
    assert not list(model.glob("tokenizer*"))
    done = run_command(["generate", str(model), "Once"])
    assert done.returncode == 2 and "has no tokenizer" in complaints(done)[0]


def test_skipped_documents_are_counted_by_file(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl")
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(text.read_bytes() + b'{"text": 3}\nnot json\n{"text": "cut')
    tree = small_config(tmp_path / "run", bad)
    tree["training"]["steps"] = 2
    done = train(tree, expect=2)
    assert f"{bad}: line 41: 'text' is a number, not text" in complaints(done)[0]
    done = train(tree, "data.on_error=skip")
    assert "data: 3 documents of 1 files left out (data.on_error: skip)" in done.stdout
    first, second = read_metrics(tmp_path / "run")
    assert first["skipped_documents"] == {str(bad): 3} and "skipped_documents" not in second


def ranks_of(run: subprocess.Popen[str] | Running) -> list[int]:
    return children(run.pid) if isinstance(run, subprocess.Popen) else [rank.pid or 0 for rank in run.ranks]


def workers_of(run: subprocess.Popen[str] | Running) -> list[int]:
    """Processes that make rows for the run: children of its ranks."""
    return [
        worker
        for rank in ranks_of(run)
        for worker in children(rank)
        if b"mf_train.data.workers" in command(worker)
    ]


def children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(child) for child in text.split()]


def command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("victim", "cold"),
    [("worker", False), ("run", False), pytest.param("worker", True, marks=pytest.mark.slow)],
)
def test_a_kill_leaves_nothing(victim: str, cold: bool, tmp_path: Path) -> None:
    """A worker's death ends all ranks with one line that says so; that of all ranks leaves no worker."""
    tree = small_config(tmp_path / "run", write_text(tmp_path / "text.jsonl"))
    tree["training"]["steps"] = 100_000
    shared_memory = set(os.listdir("/dev/shm"))
    run = start(tree, 2, cold)  # tensor 1: both ranks read
    try:
        wait_for(lambda: has_steps(tree))
        workers = workers_of(run)
        assert len(workers) == 2
        if victim == "worker":
            os.kill(workers[0], signal.SIGKILL)
            _, errors = run.communicate(timeout=60)
            assert run.returncode == 1
            said = [line for line in errors.splitlines() if line.startswith("memoryformer: ")]
            assert len(said) == 1 and "data worker 0 of data-parallel rank" in said[0]
            assert "was killed (exit status -9)" in said[0]
        else:
            for rank in ranks_of(run):
                os.kill(rank, signal.SIGKILL)
            run.communicate(timeout=60)
        wait_for(lambda: not any(b"mf_train" in command(worker) for worker in workers), 10)
        assert set(os.listdir("/dev/shm")) <= shared_memory
    finally:
        run.kill()
        run.communicate()


def test_a_shard_that_is_cut_while_it_is_read_ends_all_ranks(tmp_path: Path) -> None:
    """One rank meets the end first; all end together, and one line names the file."""
    text = write_text(tmp_path / "text.jsonl", documents=400)
    shard = Path(write_shard(tmp_path / "shard", text) + ".bin")
    tree = small_config(tmp_path / "run", text)
    tree["data"] = {"train": [{"path": str(shard)}], "logical_streams": 8}
    tree["training"]["steps"] = 100_000
    run = start(tree, 2)
    try:
        wait_for(lambda: has_steps(tree))
        os.truncate(shard, 1000)
        _, errors = run.communicate()
        assert run.returncode == 1  # as torchrun's, of processes that ended with 2
        said = [line for line in errors.splitlines() if line.startswith("memoryformer: ")]
        assert len(said) == 1, errors
        assert f"{shard} ended early" in said[0] and "it was 1000 bytes" in said[0]
    finally:
        run.kill()
        run.communicate()


def reading(rank: int, world_size: int, cases: list[list[str]]) -> list[str]:
    start_processes(find_process(), torch.device("cpu"), timeout_seconds=60)
    return [read_texts(rank, texts) for texts in cases]


def read_texts(rank: int, texts: list[str]) -> str:
    """What rank 2 r finds as its own text; odd ranks do not read, as in a tensor-parallel group of two."""
    config = Config(
        data=DataConfig(train=tuple(SourceConfig(path=path) for path in texts), logical_streams=2)
    )
    own = [path.replace("*", str(rank)) for path in texts]
    data = DataConfig(train=tuple(SourceConfig(path=path) for path in own), logical_streams=2)
    sources = [open_source(source, "k", data, Tokenizer(TOKENIZER)) for source in data.train]
    for source, path in zip(sources, texts, strict=True):
        source.name = path
    stream = (
        None if rank % 2 else TokenStream(data, Tokenizer(TOKENIZER), 32, 2, rank // 2, 2, sources=sources)
    )
    try:
        check_same_sources(stream, config, rank, torch.device("cpu"))
    except (UserError, PeerError) as error:
        return f"{type(error).__name__} {error}"
    return "the same"


def test_ranks_that_see_other_sources_are_refused(tmp_path: Path) -> None:
    for rank in range(4):
        write_text(tmp_path / f"a{rank}.jsonl")
        write_text(tmp_path / f"b{rank}.jsonl", documents=39 if rank == 2 else 40)
    same, other = str(tmp_path / "a*.jsonl"), str(tmp_path / "b*.jsonl")
    equal, (first, *rest) = zip(*run_distributed(reading, 4, [[same, same], [same, other]]), strict=True)
    assert equal == ("the same",) * 4
    assert first.startswith(f"UserError data.train[1] ({other}) is not the same for all ranks")
    assert rest == ["PeerError another rank failed with status 2"] * 3
