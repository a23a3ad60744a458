"""A rank ends with the launcher that started it, whenever that is killed; a run that a shell started goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from mf_train.parallel.launcher import find_launcher
from tests.launch.test_torchrun import _torchrun
from tests.processes import is_running, run_python, wait_until
from tests.training.runs import environment, has_steps, small_config, write_config, write_text
from tests.warm import free_port, start_warm

pytestmark = pytest.mark.distributed
SECONDS = 10.0  # in which every rank must have ended
RANKS = 2

# Stand-ins for `-m mf_train`: its command line, and then what a rank does for long.
_STANDS_STILL = """
import sys, time
from mf_train.commands import add_command
from mf_train import cli
def stand(given):
    import pathlib, os
    pathlib.Path(sys.argv[1], f"ready-{os.environ['RANK']}").touch()
    time.sleep(300)
cli._COMMANDS = (lambda commands: add_command(commands, "stand", "stand", "stand", stand),)
cli.main(["stand"])
"""
_MEETS = """
import os, pathlib, sys, time
from mf_train import cli
from mf_train.commands import add_command
def meet(given):
    import torch
    from mf_train.parallel.groups import start_processes
    from mf_train.parallel.processes import find_process
    pathlib.Path(sys.argv[1], f"ready-{os.environ['RANK']}").touch()
    if os.environ["RANK"] == "1":
        time.sleep(300)  # rank 0 waits for it
    start_processes(find_process(), torch.device("cpu"), 900)
cli._COMMANDS = (lambda commands: add_command(commands, "meet", "meet", "meet", meet),)
cli.main(["meet"])
"""


def children(pid: int) -> list[int]:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(word) for word in words]


def descendants(pid: int) -> set[int]:
    found = set(children(pid))
    return found.union(*(descendants(child) for child in found))


class Torchrun:
    """torchrun with two ranks on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agent: BaseProcess | None = None

    def start(self, *program: str) -> None:
        options = f"--nproc-per-node={RANKS} --master-addr=127.0.0.1 --master-port={free_port()}"
        self.agent = start_warm(_torchrun, [*options.split(), *program], self.folder / "output")
        wait_until(lambda: len(children(self.pid)) == RANKS, "no ranks")

    @property
    def pid(self) -> int:
        assert self.agent is not None and self.agent.pid is not None
        return self.agent.pid

    def kill(self) -> set[int]:
        """kill -9 of the agent alone; the processes under it that are there ten seconds later."""
        left = descendants(self.pid)
        assert len(left) >= RANKS
        os.kill(self.pid, signal.SIGKILL)
        deadline = time.monotonic() + SECONDS
        while left and time.monotonic() < deadline:
            left = {pid for pid in left if is_running(pid)}
            time.sleep(0.05)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return left

    def is_ready(self) -> bool:
        return all((self.folder / f"ready-{rank}").exists() for rank in range(RANKS))


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Torchrun]:
    running = Torchrun(tmp_path)
    yield running
    if running.agent is not None:
        running.agent.kill()
        running.agent.join()


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15, 0.25, 0.4])
def test_ranks_end_with_an_agent_that_is_killed_while_python_starts(
    torchrun: Torchrun, tmp_path: Path, delay: float
) -> None:
    program = tmp_path / "stand.py"
    program.write_text(_STANDS_STILL)
    torchrun.start(str(program), str(tmp_path))
    time.sleep(delay)
    assert not torchrun.kill(), (tmp_path / "output").read_text()


@pytest.mark.parametrize("program", [_STANDS_STILL, _MEETS], ids=["at work", "before they have met"])
def test_ranks_end_with_an_agent_that_is_killed(torchrun: Torchrun, tmp_path: Path, program: str) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    torchrun.start(str(path), str(tmp_path))
    wait_until(torchrun.is_ready, "the ranks are not ready")
    time.sleep(1.0)
    assert not torchrun.kill(), (tmp_path / "output").read_text()


def test_ranks_behind_a_wrapper_end_with_the_agent(torchrun: Torchrun, tmp_path: Path) -> None:
    program, wrapper = tmp_path / "stand.py", tmp_path / "wrapper.sh"
    program.write_text(_STANDS_STILL)
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} "$@"\ntrue\n')
    wrapper.chmod(0o755)
    torchrun.start("--no-python", str(wrapper), str(program), str(tmp_path))
    wait_until(torchrun.is_ready, "the ranks are not ready")
    assert not torchrun.kill()
    assert "ends, because torchrun, which started it, is gone" in (tmp_path / "output").read_text()


def training(folder: Path, **settings: Any) -> dict[str, Any]:
    tree = small_config(folder / "run", write_text(folder / "text.jsonl"))
    tree["training"] |= {"steps": 100_000, "validation_sequences": 0, "validation_interval": 0}
    return tree | {"parallel": {"tensor": 2}, "checkpoint": settings}


def is_saving(tree: dict[str, Any]) -> bool:
    folder = Path(tree["training"]["output_dir"]) / "checkpoints"
    return folder.is_dir() and any(".partial-" in path.name for path in folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.2, 1.0, 3.0, 6.0, 9.0, 14.0])
def test_a_training_s_ranks_end_with_the_agent_at_any_moment(
    torchrun: Torchrun, tmp_path: Path, delay: float
) -> None:
    torchrun.start("-m", "mf_train", "train", write_config(training(tmp_path, interval=0)))
    time.sleep(delay)
    assert not torchrun.kill()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["steps", "saves"])
def test_a_training_s_ranks_end_with_the_agent(torchrun: Torchrun, tmp_path: Path, when: str) -> None:
    tree = training(tmp_path, interval=1 if when == "saves" else 0)
    moments: dict[str, Callable[[], object]] = {
        "steps": lambda: has_steps(tree, 3),
        "saves": lambda: has_steps(tree, 3) and is_saving(tree),
    }
    torchrun.start("-m", "mf_train", "train", write_config(tree))
    wait_until(moments[when], f"no {when}", 120)
    assert not torchrun.kill()


def test_a_run_that_a_shell_started_outlives_it(tmp_path: Path) -> None:
    program = tmp_path / "stand.py"
    program.write_text(_STANDS_STILL)
    variables = {"RANK": "0", "SLURM_PROCID": "0"}  # also of a shell inside a job's step
    code = f"{sys.executable} {program} {tmp_path} & echo $!"
    environment = {**os.environ, **variables}
    shell = subprocess.Popen(["sh", "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
    assert shell.stdout is not None
    pid = int(shell.stdout.readline())
    shell.wait(10)
    wait_until((tmp_path / "ready-0").exists, "not ready")
    try:
        time.sleep(3.0)
        assert is_running(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


def test_a_task_ends_with_the_daemon_of_its_step(tmp_path: Path) -> None:
    """A stand-in by the name of SLURM's, which tells the rank by the name of its parent."""
    daemon, program = tmp_path / "slurmstepd", tmp_path / "stand.py"
    daemon.symlink_to(Path(sys.executable).resolve())
    program.write_text(_STANDS_STILL)
    code = f"import subprocess; subprocess.run([{sys.executable!r}, {str(program)!r}, {str(tmp_path)!r}])"
    variables = {"SLURM_PROCID": "0", "RANK": "0"}
    with subprocess.Popen([daemon, "-c", code], env=environment() | variables) as step:
        wait_until((tmp_path / "ready-0").exists, "not ready")
        (rank,) = children(step.pid)
        step.kill()
    try:
        wait_until(lambda: not is_running(rank), "the rank goes on", SECONDS)
    finally:
        if is_running(rank):
            os.kill(rank, signal.SIGKILL)


def test_who_started_a_rank() -> None:
    assert find_launcher({}) is None
    assert find_launcher({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert find_launcher({"SLURM_PROCID": "0"}) is None  # a shell in a job
    inner = "import os; from mf_train.parallel.launcher import find_launcher; print(*find_launcher(), os.getppid())"
    wrapped = f"""
import os, subprocess, sys, torch
os.environ["TORCHELASTIC_RUN_ID"] = "none"
subprocess.run(["sh", "-c", '"$0" -c "$1"; true', sys.executable, {inner!r}])
print(os.getpid())
"""
    child, own = run_python(wrapped).splitlines()
    name, pid, parent = child.split()
    assert (name, pid) == ("torchrun", own) and parent != own


def test_a_rank_in_a_container_of_its_own_is_left_alone() -> None:
    """It cannot see torchrun, which is outside; that is no sign that torchrun is gone."""
    alone = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user cannot make namespaces")
    code = "from mf_train.parallel.launcher import find_launcher; print(find_launcher())"
    for command in ([sys.executable, "-c", code], ["sh", "-c", '"$0" -c "$1"; true', sys.executable, code]):
        done = subprocess.run(
            [*alone, *command],
            env=environment() | {"TORCHELASTIC_RUN_ID": "none"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.split() == ["None"], done.stderr
