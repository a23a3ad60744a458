"""Worker processes as processes: what they import, what they survive, and that they never stay."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mf_train.config import Config, DataConfig, ModelConfig, SourceConfig, TokenizerConfig, TrainingConfig
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer
from mf_train.data.workers.batches import BatchReader
from tests.data.texts import random_documents, write_json_lines
from tests.processes import is_running, wait_until

# A trainer without a model. It says which processes its workers are, gives batches and does what it is told.
TRAINER = """
import os, pickle, signal, sys, time
from mf_train.data.workers.batches import BatchReader
from mf_train.data.stream.stream import TokenStream
from mf_train.data.tokenizer import Tokenizer

config = pickle.loads(bytes.fromhex(sys.argv[1]))
sizes = config.model.sequence_length, config.training.global_batch_size
stream = TokenStream(config.data, Tokenizer(config.tokenizer.path), *sizes)
plain = TokenStream(config.data, Tokenizer(config.tokenizer.path), *sizes)
caught = []

def check(batches):
    for _ in range(batches):
        assert (reader.next_batch() == plain.next_batch()).all()
"""


@pytest.fixture
def config(repository: Path, tmp_path: Path) -> Config:
    """Long rows of one source, so that a few batches are more than the pipes hold; two workers."""
    path = write_json_lines(tmp_path / "text" / "a.jsonl", random_documents(400, seed=1, longest=400))
    return Config(
        model=ModelConfig(sequence_length=4000, vocab_size=4096),
        data=DataConfig(train=(SourceConfig(path=path),), workers=2, timeout_seconds=60),
        tokenizer=TokenizerConfig(path=str(repository / "tokenizer")),
        training=TrainingConfig(global_batch_size=8),
    )


@pytest.fixture
def group(repository: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Trainers started by `start`; whatever is left of them and their workers in the end is killed."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.communicate()


def start(
    group: list[subprocess.Popen[str]],
    config: Config,
    code: str,
    folder: Path,
    environment: dict[str, str],
) -> subprocess.Popen[str]:
    """A trainer as the leader of a process group of its own, in a working folder."""
    script = folder / "trainer.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(TRAINER + code)
    process = subprocess.Popen(
        [sys.executable, "-P", str(script), pickle.dumps(config).hex()],
        cwd=folder,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    group.append(process)
    return process


@pytest.fixture
def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(repository)}


def wait_for_end(processes: Sequence[int]) -> None:
    wait_until(lambda: not any(map(is_running, processes)), f"{processes} are still there", 10)


def shared_memory(process: int) -> list[str]:
    """What a process has open or mapped in /dev/shm."""
    folder = Path(f"/proc/{process}")
    links = [os.readlink(link) for link in (folder / "fd").iterdir()]
    return [line for line in (folder / "maps").read_text().splitlines() + links if "/dev/shm" in line]


KILLED = """
reader = BatchReader(stream, config)
print(*(worker.process.pid for worker in reader._maker._workers), flush=True)
{before}
print("ready", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("before", ["", "check(3)"], ids=["at the start", "at work"])
def test_kill_9_of_the_trainer_leaves_nothing(
    config: Config,
    group: list[subprocess.Popen[str]],
    tmp_path: Path,
    environment: dict[str, str],
    before: str,
) -> None:
    trainer = start(group, config, KILLED.format(before=before), tmp_path / "run", environment)
    assert trainer.stdout is not None
    workers = [int(word) for word in trainer.stdout.readline().split()]
    assert trainer.stdout.readline() == "ready\n" and len(workers) == 2
    if before:
        assert all(map(is_running, workers))
        assert [shared_memory(process) for process in (trainer.pid, *workers)] == [[], [], []]
    trainer.kill()
    trainer.wait()
    wait_for_end(workers)


CLOSED = """
reader = BatchReader(stream, config)
check(2)
processes = [worker.process for worker in reader._maker._workers]
os.kill(processes[1].pid, signal.SIGSTOP)
while ") T " not in open(f"/proc/{processes[1].pid}/stat").read():
    time.sleep(0.01)
reader.close()
print([process.returncode for process in processes])
"""


def test_closing_ends_workers_that_hang(
    config: Config, group: list[subprocess.Popen[str]], tmp_path: Path, environment: dict[str, str]
) -> None:
    """One is stopped, as in a read that does not come back: it is killed."""
    output, errors = start(group, config, CLOSED, tmp_path / "run", environment).communicate(timeout=60)
    assert (output, errors) == ("[0, -9]\n", "")


SIGNALLED = """
numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1]
for number in numbers:
    signal.signal(number, lambda number, frame: caught.append(number))

def send():
    for number in numbers:
        os.killpg(0, number)

reader = BatchReader(stream, config)
send()  # the workers' interpreters are starting
check(1)
send()
check(20)  # more than the pipes held
reader.close()
print(sorted(caught) == sorted(2 * numbers), [worker.process.returncode for worker in reader._maker._workers])
"""


def test_signals_to_the_group_are_the_trainers(
    config: Config, group: list[subprocess.Popen[str]], tmp_path: Path, environment: dict[str, str]
) -> None:
    """It can still read the batch that it was waiting for, and save."""
    output, errors = start(group, config, SIGNALLED, tmp_path / "run", environment).communicate(timeout=60)
    assert (output, errors) == ("True [0, 0]\n", "")


ELSEWHERE = """
reader = BatchReader(stream, config)
check(3)
reader.close()
print("done")
"""


def test_in_another_working_folder(
    config: Config, group: list[subprocess.Popen[str]], tmp_path: Path, environment: dict[str, str]
) -> None:
    """Relative paths mean the same to the workers, and what lies in the folder is not imported."""
    folder = tmp_path / "elsewhere"
    write_json_lines(folder / "data" / "a.jsonl", random_documents(100, seed=2))
    for name in ("pickle.py", "mf_train.py", "numpy.py", "sitecustomize.py"):
        (folder / name).write_text(f"raise SystemExit('{name} was imported')\n")
    source = SourceConfig(path="data/*.jsonl")
    relative = replace(config, data=replace(config.data, train=(source,)))
    output, errors = start(group, relative, ELSEWHERE, folder, environment).communicate(timeout=60)
    assert (output, errors) == ("done\n", "")


def test_what_prints_at_the_start_is_no_row(
    config: Config, group: list[subprocess.Popen[str]], tmp_path: Path, environment: dict[str, str]
) -> None:
    """Some sites' Python says hello on standard output: in a worker that is standard error."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('hello')\n")
    environment["PYTHONPATH"] += f"{os.pathsep}{tmp_path / 'site'}"
    config = replace(config, data=replace(config.data, workers=1))
    output, errors = start(group, config, ELSEWHERE, tmp_path / "run", environment).communicate(timeout=60)
    assert (output, errors) == ("hello\ndone\n", "hello\n")


def test_a_worker_imports_little(
    config: Config, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is there in a moment, and small. Python reports each module that the worker imports."""
    stream = TokenStream(config.data, tokenizer, 4000, 8)
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")
    reader = BatchReader(stream, config)
    reader.next_batch()
    reader.close()
    lines = capfd.readouterr().err.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert {"numpy", "sentencepiece", "mf_train"} <= imported
    heavy = {"torch", "deepspeed", "transformers", "megatron", "datasets", "triton", "tensorboard"}
    assert not imported & heavy, imported & heavy
