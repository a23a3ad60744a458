"""A rank as srun starts it: its log, the copy of rank 0's, its exit status, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mf_train.launch.logs import parse_ending, parse_head
from tests.training.runs import REPOSITORY, environment

HOST = os.uname().nodename
_TIMEOUT = 30

# LOGS and a program that runs in place of the command line.
_RANK = """
import os, signal, sys, time
from pathlib import Path
from mf_train.launch.rank import run_rank
folder = Path(sys.argv[1])
def wait():
    (folder / "ready").touch()
    time.sleep(300)
run_rank(folder, lambda: exec(sys.argv[2], globals()))
"""
_SAVE = """
def stop(number, frame):
    print("saved at", signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop), signal.signal(signal.SIGTERM, stop)
wait()
"""


def as_task(rank: int) -> dict[str, str]:
    task = {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": str(rank)}
    return {**environment(), **task, "SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


def start(folder: Path, rank: int, program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _RANK, str(folder), program],
        env=as_task(rank),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Status and standard output; nothing comes on standard error."""
    output, errors = process.communicate(timeout=_TIMEOUT)
    assert errors == ""
    return process.returncode, output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def log_of(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank-{rank:05d}.log").read_text().splitlines()


def test_a_rank_s_output_is_in_its_log_alone(tmp_path: Path) -> None:
    program = "print('hello'); print('oh', file=sys.stderr); os.system('echo a child'); sys.exit(1)"
    assert finish(start(tmp_path / "logs", 1, program)) == (1, "")
    head, *lines, last = log_of(tmp_path / "logs", 1)
    start_of_log, ending = parse_head(head), parse_ending(last)
    assert start_of_log is not None and start_of_log[:2] == (1, HOST)
    assert f"python {sys.version.split()[0]} ({sys.executable}), {REPOSITORY / 'mf_train'}" in head
    assert lines == ["hello", "oh", "a child"]
    assert ending is not None and ending[:3] == (1, HOST, 1)
    assert 0 <= time.time() - ending.time < 60
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank-00001.log"]


def test_rank_0_is_also_heard_where_it_was_started(tmp_path: Path) -> None:
    status, output = finish(start(tmp_path, 0, "print('hello'); sys.exit(75)"))
    assert status == 75
    assert output.splitlines() == log_of(tmp_path, 0)
    assert output.splitlines()[1] == "hello"


def test_nothing_is_lost_when_rank_0_ends_at_once(tmp_path: Path) -> None:
    program = "print('x' * 300_000); os.write(2, b'last words\\n'); os._exit(1)"
    status, output = finish(start(tmp_path, 0, program))
    assert status == 1
    assert output.splitlines()[1:] == ["x" * 300_000, "last words"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_traceback_and_a_crash_are_in_the_log(tmp_path: Path, rank: int) -> None:
    assert finish(start(tmp_path / "1", rank, "1 / 0"))[0] == 1
    assert "ZeroDivisionError: division by zero" in log_of(tmp_path / "1", rank)
    status, _ = finish(start(tmp_path / "2", rank, "os.kill(os.getpid(), signal.SIGSEGV)"))
    assert status == (139 if rank == 0 else -11)  # srun tells both as 139
    assert "Fatal Python error: Segmentation fault" in log_of(tmp_path / "2", rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_reaches_the_command(tmp_path: Path, rank: int) -> None:
    process = start(tmp_path, rank, _SAVE)
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 75
    assert log_of(tmp_path, rank)[1] == "saved at SIGUSR1"


def test_a_request_to_every_process_at_once(tmp_path: Path) -> None:
    """As SLURM sends it: rank 0's parent copies on."""
    process = start(tmp_path, 0, _SAVE)
    wait_for(tmp_path / "ready", process)
    os.killpg(process.pid, signal.SIGTERM)
    status, output = finish(process)
    assert status == 75
    assert output.splitlines() == log_of(tmp_path, 0)
    assert output.splitlines()[1] == "saved at SIGTERM"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_before_the_command_listens(tmp_path: Path, rank: int) -> None:
    process = start(tmp_path, rank, "wait()")
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    lines = log_of(tmp_path, rank)
    assert lines[1] == "asked to stop by SIGTERM before training began"
    ending = parse_ending(lines[2])
    assert ending is not None and ending.status == 75


def test_rank_0_ends_with_its_parent(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "wait()")
    wait_for(tmp_path / "ready", process)
    child = int(log_of(tmp_path, 0)[0].partition("pid ")[2].partition(",")[0])
    process.kill()
    assert process.wait(_TIMEOUT) == -9
    process.communicate(timeout=_TIMEOUT)  # the pipes are closed: nobody holds them
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["LOGS", "--", "train", "missing.yaml"], 2, ""),
        (["LOGS", "train", "missing.yaml"], 2, "usage: python -m mf_train.launch.rank LOGS -- train"),
        (
            ["FILE", "--", "train", "x.yaml"],
            1,
            "FILE/rank-00000.log: the log of rank 0 cannot be written on HOST: ",
        ),
    ],
)
def test_the_command_and_what_is_wrong_with_it(
    tmp_path: Path, arguments: list[str], status: int, message: str
) -> None:
    (tmp_path / "FILE").touch()
    names = {"LOGS": str(tmp_path / "logs"), "FILE": str(tmp_path / "FILE")}
    done = subprocess.run(
        [sys.executable, "-m", "mf_train.launch.rank", *(names.get(word, word) for word in arguments)],
        env=as_task(0),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    assert done.returncode == status, done.stderr
    if message:
        expected = message.replace("FILE", names["FILE"]).replace("HOST", HOST)
        assert done.stderr.startswith(f"memoryformer: {expected}")
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.stderr == ""
        assert "memoryformer: missing.yaml: no such configuration file" in log_of(tmp_path / "logs", 0)
