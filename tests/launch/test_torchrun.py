"""Ranks under torchrun, as the job script starts it, on two nodes that are this machine: what their logs tell.

The ranks run a short program in place of the trainer. torchrun is forked from a server that has loaded torch already.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from mf_train.exit_status import STOPPED
from mf_train.launch.logs import stop_file
from mf_train.launch.report import judge
from tests.distributed import _free_port
from tests.warm import start_warm

_TIMEOUT = 60.0
_WAIT = 5.0  # for the other nodes; srun's --wait is longer

# `wait` ends at a stop signal, after a save of so many seconds; `ready` listens to none.
_RANK = """
import os, signal, sys, time
from pathlib import Path
from mf_train.launch.rank import run_rank
folder, programs = Path(sys.argv[1]), eval(sys.argv[2])
rank = int(os.environ["RANK"])

def ready():
    (folder / f"ready-{rank}").touch()
    time.sleep(300)

def ignore(*_):
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)

def wait(save=0.0):
    def stop(number, frame):
        ignore()
        time.sleep(save)
        (folder / f"saved-{rank}").touch()
        sys.exit(75)
    signal.signal(signal.SIGUSR1, stop), signal.signal(signal.SIGTERM, stop)
    ready()

def after(*others):
    while not all((folder / other).exists() for other in others):
        time.sleep(0.02)

sys.exit(run_rank(folder, lambda: exec(programs.get(rank, programs.get("*", "pass")), globals())))
"""


def _torchrun(arguments: list[str], output: Path) -> None:
    from torch.distributed.run import main

    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os.environ["PET_SHUTDOWN_TIMEOUT"] = "600"
    main(arguments)


class Start:
    """torchrun on the nodes of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "logs"
        self.folder.mkdir()
        self.program = folder / "rank.py"
        self.program.write_text(_RANK)
        self.nodes: list[BaseProcess] = []

    def __call__(self, programs: dict[int | str, str], nodes: int = 2, meet: int = 60) -> None:
        port = _free_port()
        for node in range(nodes):
            options = f"--nnodes={nodes} --nproc-per-node=2 --node-rank={node} --master-addr=127.0.0.1 --max-restarts=0"
            arguments = [*options.split(), f"--master-port={port}", f"--rdzv-conf=timeout={meet}"]
            arguments += [str(self.program), str(self.folder), repr(programs)]
            self.nodes.append(start_warm(_torchrun, arguments, self.folder / f"node-{node:03d}.log"))

    def wait_for(self, *names: str) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"no {names}: {self.tell()}"
            time.sleep(0.02)

    def wait_until_ready(self) -> None:
        self.wait_for(*(f"ready-{rank}" for rank in range(2 * len(self.nodes))))

    def outcome(self, timeout: float = _TIMEOUT) -> tuple[int, list[str]]:
        """Waits for the ends, and judges as the job's script does."""
        ended = wait([node.sentinel for node in self.nodes], timeout)
        assert ended, self.tell()
        for node in self.nodes:
            node.join(_WAIT)
            node.kill()  # as srun does with its step
            node.join()
        deadline = time.monotonic() + 10
        while not all(map(is_gone, self.ranks())):
            assert time.monotonic() < deadline, self.tell()
            time.sleep(0.05)
        return judge(self.folder, 2 * len(self.nodes), max(abs(node.exitcode or 0) for node in self.nodes))

    def ranks(self) -> list[int]:
        """Process ids of the ranks that have written their head."""
        heads = [path.read_text().partition("pid ")[2] for path in self.folder.glob("rank-*.log")]
        return [int(head.partition(",")[0]) for head in heads]

    def tell(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("*.log")))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    start = Start(tmp_path)
    yield start
    for node in start.nodes:
        node.kill()
        node.join()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(
    ("programs", "status", "first"),
    [
        ({"*": "print(*[os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')])"},
         0, ""),
        ({0: "pass", 1: "pass", "*": "time.sleep(1); sys.exit(75)"}, 75, ""),
        ({2: "after('ready-3'); sys.exit(1)", 3: "wait()"}, 1, "rank 2 on HOST ended with status 1"),
        ({0: "sys.exit(2)", "*": "pass"}, 2, "rank 0 on HOST ended with status 2"),
        ({1: "os.kill(os.getpid(), 9)"}, 137, "rank 1 on HOST was killed by signal 9 (SIGKILL, out of memory?)"),
        ({3: "after('saved-2'); os._exit(7)", 2: "(folder / 'saved-2').touch(); sys.exit(75)"}, 7,
         "rank 3 on HOST ended with status 7"),
        ({1: "os.kill(os.getppid(), 9)"}, 1, "rank 1 on HOST left no ending (killed, or its node has gone)"),
    ],
)  # fmt: skip
def test_the_outcome_is_that_of_the_first_failure(
    start: Start, programs: dict[int | str, str], status: int, first: str
) -> None:
    start(programs)
    outcome, lines = start.outcome()
    assert outcome == status, start.tell()
    assert "".join(lines[:1]).startswith(
        f"first error: {first}".replace("HOST", os.uname().nodename) * bool(first)
    )


@pytest.mark.parametrize("how", ["the file", "SIGTERM"])
def test_a_request_to_stop_lets_every_rank_save(start: Start, how: str) -> None:
    start({0: "wait(0.1)", "*": "wait(1.5)"})
    start.wait_until_ready()
    if how == "the file":
        stop_file(start.folder).touch()
    else:
        for node in start.nodes:
            node.terminate()
    assert start.outcome() == (STOPPED, []), start.tell()
    assert all((start.folder / f"saved-{rank}").exists() for rank in range(4))


@pytest.mark.parametrize("delay", [0.0, 0.5, 1.0])
def test_a_request_at_any_moment_of_the_start(start: Start, delay: float) -> None:
    start({"*": "wait()"}, nodes=1)
    time.sleep(delay)
    stop_file(start.folder).touch()
    assert start.outcome() == (STOPPED, []), start.tell()


@pytest.mark.slow
def test_a_request_before_all_ranks_listen(start: Start) -> None:
    """Rank 1 listens already, and hangs as it waits for rank 0: torchrun kills it after 30 s."""
    start({0: "ready()", 1: "ignore(); ready()"}, nodes=1)
    start.wait_until_ready()
    stop_file(start.folder).touch()
    assert start.outcome(timeout=45) == (STOPPED, []), start.tell()


@pytest.mark.slow
def test_a_rank_that_does_not_end_is_killed(start: Start) -> None:
    start({0: "after('ready-1'); sys.exit(3)", 1: "ignore(); ready()"}, nodes=1)
    status, lines = start.outcome(timeout=45)
    assert status == 3, start.tell()
    assert "  rank 1: no ending: killed, or the node has gone" in lines


@pytest.mark.slow
def test_a_save_of_40_seconds_is_waited_for(start: Start) -> None:
    start({0: "wait(1)", "*": "wait(40)"})
    start.wait_until_ready()
    for node in start.nodes:
        node.terminate()
    assert start.outcome(timeout=90) == (STOPPED, []), start.tell()
    assert all((start.folder / f"saved-{rank}").exists() for rank in range(4))


def test_ranks_end_with_their_starter(start: Start) -> None:
    start({"*": "wait()"}, nodes=1)
    start.wait_until_ready()
    start.nodes[0].kill()
    assert start.outcome()[0] == signal.SIGKILL


def test_nodes_that_do_not_come(start: Start) -> None:
    start({"*": "pass"}, meet=2)
    start.nodes[1].kill()
    status, lines = start.outcome()
    assert status != 0 and lines[0].startswith("first error: a process on node-000 failed at "), start.tell()
    assert any("1/2 clients joined" in line for line in lines)
