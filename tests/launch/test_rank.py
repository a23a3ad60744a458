"""A rank as srun or torchrun starts it: its log, exit status and signals. Several under torchrun: test_torchrun.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mf_train.launch.logs import Ending, is_request, parse_ending, parse_head, stop_file
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
sys.exit(run_rank(folder, lambda: exec(sys.argv[2], globals())))
"""
_SAVE = """
def stop(number, frame):
    signal.signal(signal.SIGUSR1, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the trainer
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


def finish(process: subprocess.Popen[str]) -> int:
    """Its status; nothing is written where it was started."""
    assert process.communicate(timeout=_TIMEOUT) == ("", "")
    return process.returncode


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, f"no {path}"
        time.sleep(0.02)


def log_of(folder: Path, rank: int) -> list[str]:
    return (folder / f"rank-{rank:05d}.log").read_text().splitlines()


def ending_of(folder: Path, rank: int = 1) -> Ending:
    ending = parse_ending(log_of(folder, rank)[-1])
    assert ending is not None and ending[:2] == (rank, HOST) and 0 <= time.time() - ending.time < 60
    return ending


def test_a_rank_s_output_is_in_its_log_alone(tmp_path: Path) -> None:
    program = "print('hello'); print('oh', file=sys.stderr); os.system('echo a child'); sys.exit(1)"
    assert finish(start(tmp_path / "logs", 1, program)) == 1
    head, *lines, _ = log_of(tmp_path / "logs", 1)
    start_of_log = parse_head(head)
    assert start_of_log is not None and start_of_log[:2] == (1, HOST)
    assert f"python {sys.version.split()[0]} ({sys.executable}), {REPOSITORY / 'mf_train'}" in head
    assert lines == ["hello", "oh", "a child"]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank-00001.log"]


@pytest.mark.parametrize(
    ("program", "status", "told", "line"),
    [
        ("pass", 0, 0, ""),
        ("sys.exit(75)", 0, 75, ""),  # it has saved: no failure, for which torchrun would end the others
        ("sys.exit(2)", 2, 2, ""),
        ("sys.exit('words')", 1, 1, "words"),
        ("1 / 0", 1, 1, "ZeroDivisionError: division by zero"),
        ("os.write(2, b'last words'); os._exit(7)", 7, 7, "last words"),
        ("os.write(1, b'step 3'); os.kill(os.getpid(), signal.SIGKILL)", 137, 137, "step 3"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, 139, "Fatal Python error: Segmentation fault"),
    ],
)
def test_how_it_ends(tmp_path: Path, program: str, status: int, told: int, line: str) -> None:
    assert finish(start(tmp_path, 1, program)) == status
    ending = ending_of(tmp_path)
    assert (ending.status, ending.note) == (told, "out of memory?" if told == 137 else "")
    assert not line or line in log_of(tmp_path, 1)


@pytest.mark.parametrize("send", [os.kill, os.killpg])  # SLURM's plug-ins reach the starter alone, or all
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_stop_reaches_the_command(
    tmp_path: Path, send: Callable[[int, int], None], number: signal.Signals
) -> None:
    process = start(tmp_path, 0, _SAVE)
    wait_for(tmp_path / "ready", process)
    send(process.pid, number)
    assert finish(process) == 0 and ending_of(tmp_path, 0).status == 75
    (request,) = filter(is_request, log_of(tmp_path, 0))
    assert request.startswith(f"rank 0 on {HOST} was asked to end by {number.name} at ")
    assert f"saved at {number.name}" in log_of(tmp_path, 0)


@pytest.mark.parametrize("early", [False, True])
def test_the_file_that_asks_to_stop(tmp_path: Path, early: bool) -> None:
    """Made by the job's script, also before the rank has started."""
    if early:
        stop_file(tmp_path).touch()
        assert finish(start(tmp_path, 1, "wait()")) == 75
        assert ending_of(tmp_path).on_request
        return
    process = start(tmp_path, 1, _SAVE)
    wait_for(tmp_path / "ready", process)
    stop_file(tmp_path).touch()
    assert finish(process) == 0 and ending_of(tmp_path).status == 75
    assert "saved at SIGUSR1" in log_of(tmp_path, 1)


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_request_before_the_command_listens(tmp_path: Path, send: Callable[[int, int], None]) -> None:
    process = start(tmp_path, 1, "wait()")
    wait_for(tmp_path / "ready", process)
    send(process.pid, signal.SIGTERM)
    assert finish(process) == 75  # the others cannot train without it
    assert ending_of(tmp_path).on_request


def test_the_command_ends_with_what_waits_for_it(tmp_path: Path) -> None:
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
