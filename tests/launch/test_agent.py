"""The agents of two nodes with real ranks, on this machine: what they end with, whatever happens to whom and when.

The ranks run a short program in place of the trainer, which trains in the last tests. Agents are forked from a server
that has loaded torch already; one that is started as srun starts it takes seconds to load it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from mf_train.launch.agent import run_agent
from mf_train.launch.logs import parse_ending
from mf_train.launch.node import Node
from mf_train.launch.report import first_error
from tests.distributed import _free_port
from tests.training.runs import REPOSITORY, environment, read_metrics, small_config, write_text
from tests.warm import start_warm

_TIMEOUT = 60.0

# LOGS, then a program's lines by rank, "*" for every other. `wait` ends at a stop signal, after a save of so many
# seconds; `listen` only takes the signals.
_WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from mf_train.launch.rank import run_rank
folder, programs = Path(sys.argv[1]), json.loads(sys.argv[2])
rank = os.environ["RANK"]

def listen(save=0.0):
    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        time.sleep(save)
        (folder / f"saved-{rank}").write_text(signal.Signals(number).name)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGUSR1, stop)

def ready():
    (folder / f"ready-{rank}").touch()
    time.sleep(300)

def wait(save=0.0):
    listen(save)
    ready()

def after(other):
    while not (folder / other).exists():
        time.sleep(0.02)

run_rank(folder, lambda: exec(programs.get(rank, programs.get("*", "pass")), globals()))
"""


def _agent(node: Node, folder: Path, worker: list[str], grace: float, output: Path) -> None:
    """In a process of its own, as srun would start it: a session leader with its output in a file."""
    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    os._exit(run_agent(node, folder, worker, grace))


class Job:
    """Agents of the nodes of one job."""

    def __init__(self, folder: Path, nodes: int = 2, per_node: int = 2) -> None:
        self.folder, self.nodes, self.per_node = folder / "logs", nodes, per_node
        self.output = folder / "job.out"
        self.folder.mkdir()
        self.output.touch()
        self.agents: list[BaseProcess] = []
        self._port = _free_port()

    def start(self, programs: dict[str, str], grace: float = 30.0, nodes: list[int] | None = None) -> None:
        worker = [sys.executable, "-c", _WORKER, str(self.folder), json.dumps(programs)]
        for number in range(self.nodes) if nodes is None else nodes:
            node = Node(number, self.nodes, self.per_node, "127.0.0.1", self._port)
            arguments = (node, self.folder, worker, grace, self.output)
            self.agents.append(start_warm(_agent, *arguments))

    def wait_for(self, *names: str, timeout: float = _TIMEOUT) -> None:
        deadline = time.monotonic() + timeout
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, f"no {names}: {self.tell()}"
            time.sleep(0.02)

    def wait_until_ready(self) -> None:
        self.wait_for(*(f"ready-{rank}" for rank in range(self.nodes * self.per_node)))

    def statuses(self, timeout: float = _TIMEOUT) -> list[int | None]:
        deadline = time.monotonic() + timeout
        for agent in self.agents:
            agent.join(max(0.0, deadline - time.monotonic()))
        return [agent.exitcode for agent in self.agents]

    def read(self, name: str) -> str:
        return (self.folder / name).read_text()

    def tell(self) -> str:
        logs = [f"{path.name}:\n{path.read_text()}" for path in sorted(self.folder.glob("*.log"))]
        return "\n".join([self.output.read_text(), *logs])

    def ranks(self) -> dict[int, int]:
        """Process ids of the ranks that have written their head."""
        heads = {int(path.stem[5:]): path.read_text() for path in self.folder.glob("rank-*.log")}
        return {rank: int(text.partition("pid ")[2].partition(",")[0]) for rank, text in heads.items()}

    def close(self) -> None:
        for agent in self.agents:
            agent.kill()
            agent.join()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with_two_nodes = Job(tmp_path)
    yield with_two_nodes
    with_two_nodes.close()


@pytest.fixture
def one_node(tmp_path: Path) -> Iterator[Job]:
    with_one_node = Job(tmp_path, nodes=1)
    yield with_one_node
    with_one_node.close()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_numbers_the_ranks_and_keeps_their_output_apart(job: Job) -> None:
    names = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR"
    program = (
        f"print(*[os.environ[name] for name in '{names}'.split()]); os.system('echo a child of {{rank}} >&2')"
    )
    job.start({"*": program.replace("of {rank}", "of $RANK")})
    assert job.statuses() == [0, 0], job.tell()
    for rank in range(4):
        lines = job.read(f"rank-{rank:05d}.log").splitlines()
        assert lines[0].startswith(f"rank {rank} on {os.uname().nodename} started at ")
        assert lines[1:3] == [f"{rank} {rank % 2} 4 2 127.0.0.1", f"a child of {rank}"]
        ending = parse_ending(lines[3])
        assert ending is not None and (ending.rank, ending.status) == (rank, 0)
    assert job.output.read_text() == job.read("rank-00000.log")


@pytest.mark.parametrize(
    ("programs", "status", "said"),
    [
        ({"*": "sys.exit(75)"}, 75, []),
        ({"0": "pass", "1": "pass", "*": "sys.exit(75)"}, 75, []),
        ({"2": "sys.exit(1)", "*": "wait()"}, 1, ["rank 2 on HOST ended with status 1"]),
        ({"0": "sys.exit(2)", "*": "time.sleep(300)"}, 2, []),  # rank 0's own output is there
        ({"3": "1 / 0", "*": "wait()"}, 1, ["rank 3 on HOST ended with status 1"]),
        ({"1": "os.kill(os.getpid(), 9)", "*": "wait()"}, 137, ["rank 1 on HOST was killed by signal 9 (SIGKILL)"]),
        ({"3": "after('rank-00000.log'); os._exit(7)", "*": "ready()"}, 7, ["rank 3 on HOST ended with status 7"]),
        # 75 is the greatest, and srun would end with it
        ({"2": "signal.signal(signal.SIGTERM, signal.SIG_IGN); (folder / 'ready-2').touch(); after('saved-0'); "
          "sys.exit(4)", "0": "after('ready-2'); (folder / 'saved-0').touch(); sys.exit(75)", "3": "ready()",
          "*": "after('saved-0'); sys.exit(75)"}, 4, ["rank 2 on HOST ended with status 4"]),
    ],
)  # fmt: skip
def test_all_nodes_end_with_the_status_of_the_first_failure(
    job: Job, programs: dict[str, str], status: int, said: list[str]
) -> None:
    job.start(programs)
    assert job.statuses() == [status, status], job.tell()
    spoken = [line for line in job.output.read_text().splitlines() if line.startswith("memoryformer: ")]
    assert [line.partition(" at ")[0] for line in spoken] == [
        f"memoryformer: {line.replace('HOST', os.uname().nodename)}" for line in said
    ]
    assert all(is_gone(pid) for pid in job.ranks().values())


def to_agent(agent: BaseProcess, number: int) -> None:
    assert agent.pid is not None
    os.kill(agent.pid, number)


def to_group(agent: BaseProcess, number: int) -> None:
    assert agent.pid is not None
    os.killpg(agent.pid, number)


def to_all_descendants(agent: BaseProcess, number: int) -> None:
    """As SLURM's linuxproc does: the agent and what it started."""
    assert agent.pid is not None
    pids = [agent.pid]
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            pids += map(int, (task / "children").read_text().split())
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def twice(agent: BaseProcess, number: int) -> None:
    to_agent(agent, number)
    time.sleep(0.3)
    to_agent(agent, number)


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (to_agent, signal.SIGUSR1),
        (to_agent, signal.SIGTERM),
        (to_group, signal.SIGTERM),
        (to_all_descendants, signal.SIGUSR1),
        (to_all_descendants, signal.SIGTERM),
        (twice, signal.SIGUSR1),
    ],
)
def test_a_request_to_stop_lets_every_rank_save(
    job: Job, send: Callable[[BaseProcess, int], None], number: signal.Signals
) -> None:
    job.start({"0": "wait(0.1)", "*": "wait(0.8)"}, grace=0.5)  # a stop has no time limit
    job.wait_until_ready()
    for agent in job.agents:
        send(agent, number)
    assert job.statuses() == [75, 75], job.tell()
    # TERM where rank 0 had saved and ended before the machine got to handing the request on
    assert {job.read(f"saved-{rank}") for rank in range(4)} <= {number.name, "SIGTERM"}
    assert job.read("saved-0") == number.name
    assert "memoryformer: " not in job.output.read_text()


def test_a_stop_that_only_one_node_hears_of_ends_all(job: Job) -> None:
    job.start({"*": "wait()"})
    job.wait_until_ready()
    to_agent(job.agents[1], signal.SIGUSR1)
    assert job.statuses() == [75, 75], job.tell()
    assert {job.read(f"saved-{rank}") for rank in range(4)} == {"SIGTERM", "SIGUSR1"}


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_before_the_nodes_have_met(job: Job, number: signal.Signals) -> None:
    job.start({"*": "pass"}, nodes=[0])
    job.wait_for("node-000.log")
    time.sleep(0.5)
    to_agent(job.agents[0], number)
    assert job.statuses(timeout=5) == [75], job.tell()
    assert f"asked to stop by {number.name} before its ranks were started" in job.read("node-000.log")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_before_the_ranks_listen(job: Job, number: signal.Signals) -> None:
    """Rank 2 listens already, and hangs as it waits for the others: nobody has anything to save."""
    job.start(
        {"2": "signal.signal(15, signal.SIG_IGN), signal.signal(10, signal.SIG_IGN), ready()", "*": "ready()"}
    )
    job.wait_until_ready()
    before = time.monotonic()
    for agent in job.agents:
        to_agent(agent, number)
    assert job.statuses() == [75, 75], job.tell()
    assert time.monotonic() - before < 15  # and not the 30 s of a failure


def test_stops_at_any_moment_of_the_start(tmp_path: Path) -> None:
    """From the moment when the node's log is there, which is before torch is loaded, to ranks that listen."""
    for delay in (0.0, 0.15, 0.3, 0.45, 0.6):
        (tmp_path / str(delay)).mkdir()
        job = Job(tmp_path / str(delay), nodes=1)
        job.start({"*": "wait()"})
        job.wait_for("node-000.log")
        time.sleep(delay)
        to_agent(job.agents[0], signal.SIGUSR1)
        try:
            assert job.statuses(timeout=20) == [75], f"{delay}: {job.tell()}"
        finally:
            job.close()


def test_a_rank_that_does_not_end_is_killed(job: Job) -> None:
    stuck = "signal.signal(15, signal.SIG_IGN); ready()"
    job.start({"0": "after('ready-3'); after('ready-1'); sys.exit(3)", "*": stuck}, grace=1.0)
    assert job.statuses(timeout=30) == [3, 3], job.tell()
    for node, rank in ((0, 1), (1, 3)):
        assert f"killing ranks of {os.uname().nodename} that have not ended in time: " in job.read(
            f"node-00{node}.log"
        )
        assert f"rank {rank} on {os.uname().nodename} was killed by signal 9 (SIGKILL) at " in job.read(
            f"node-00{node}.log"
        )
    assert all(is_gone(pid) for pid in job.ranks().values())


def test_ranks_that_save_have_the_time_for_it_when_another_fails(one_node: Job) -> None:
    one_node.start({"0": "after('ready-1'); sys.exit(1)", "1": "wait(2.0)"}, grace=20)
    assert one_node.statuses() == [1], one_node.tell()
    assert one_node.read("saved-1") == "SIGTERM"


def test_ranks_end_with_their_agent(job: Job) -> None:
    job.start({"*": "wait()"}, grace=2.0)
    job.wait_until_ready()
    ranks = job.ranks()
    os.kill(job.agents[0].pid or 0, signal.SIGKILL)
    assert job.statuses(timeout=30)[1] not in (0, None), job.tell()
    assert all(is_gone(pid) for pid in ranks.values())
    assert "the agent of node 0 has gone" in job.read("node-001.log")


def test_what_the_watch_of_rank_0_says_last_is_in_the_job_s_output(one_node: Job) -> None:
    lines = "".join(f"print('line {number}');" for number in range(2000))
    one_node.start({"0": f"{lines} os.write(2, b'memoryformer: no progress\\n'); os._exit(1)", "1": "wait()"})
    assert one_node.statuses() == [1], one_node.tell()
    assert one_node.output.read_text().splitlines()[-1] == "memoryformer: no progress"
    assert len(one_node.output.read_text().splitlines()) == 2002


@pytest.mark.slow
def test_a_node_that_has_gone_is_not_waited_for(job: Job) -> None:
    job.start({"0": "after('go'); sys.exit(6)", "*": "wait()"})
    job.wait_for("ready-2", "ready-3", "ready-1")
    job.agents[1].kill()
    time.sleep(1)
    (job.folder / "go").touch()
    assert job.statuses(timeout=40) == [6, -9], job.tell()


def test_nodes_that_do_not_come(tmp_path: Path) -> None:
    port = str(_free_port())
    variables = {**ONE_NODE, "SLURM_STEP_NUM_NODES": "2", "MASTER_PORT": port}
    agent = start_agent([str(tmp_path), "1", "--meet", "1", "--", "train", "x.yaml"], **variables)
    _, errors = agent.communicate(timeout=_TIMEOUT)
    assert agent.returncode == 1
    assert errors.startswith(
        f"memoryformer: node 0 of 2 on {os.uname().nodename} could not meet the others at "
    )
    assert len(errors.splitlines()) == 1, errors
    assert errors.removeprefix("memoryformer: ") in (tmp_path / "node-000.log").read_text()


@pytest.mark.slow
def test_a_save_of_40_seconds_is_waited_for(job: Job) -> None:
    """torchrun kills after 30 s."""
    job.start({"0": "wait(1)", "*": "wait(40)"})
    job.wait_until_ready()
    for agent in job.agents:
        to_agent(agent, signal.SIGTERM)
    assert job.statuses(timeout=90) == [75, 75], job.tell()
    assert all((job.folder / f"saved-{rank}").exists() for rank in range(4))


def start_agent(arguments: list[str], **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mf_train.launch.agent", *arguments],
        env={**environment(), **variables},
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


ONE_NODE = {"SLURM_NODEID": "0", "SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "127.0.0.1"}


def test_by_hand_it_says_what_is_missing(tmp_path: Path) -> None:
    agent = start_agent([str(tmp_path), "1", "--", "train", "x.yaml"], **ONE_NODE)
    _, errors = agent.communicate(timeout=_TIMEOUT)
    assert agent.returncode == 2
    assert errors.startswith("memoryformer: environment: MASTER_PORT is missing: start with srun")
    assert len(errors.splitlines()) == 1


def test_logs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    agent = start_agent(
        [str(tmp_path / "file"), "1", "--", "train", "x.yaml"], **ONE_NODE, MASTER_PORT="29400"
    )
    _, errors = agent.communicate(timeout=_TIMEOUT)
    assert agent.returncode == 1
    assert errors.startswith(
        f"memoryformer: {tmp_path / 'file'}: logs cannot be written on {os.uname().nodename}: "
    )
    assert len(errors.splitlines()) == 1


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        agent = start_agent([str(tmp_path), "1", "--", "train", "x.yaml"], **ONE_NODE, MASTER_PORT=port)
        _, errors = agent.communicate(timeout=_TIMEOUT)
    assert agent.returncode == 1
    assert errors.startswith(
        f"memoryformer: node 0 of 1 on {os.uname().nodename} could not meet the others at "
    )
    assert len(errors.splitlines()) == 1, errors
    assert "in use" in errors


@pytest.mark.slow
def test_trains_stops_and_resumes(tmp_path: Path) -> None:
    """The trainer itself on two nodes of a rank each: USR1 to one agent saves, the next start goes on."""
    run = tmp_path / "run"
    tree = small_config(run, write_text(tmp_path / "text.jsonl"))
    tree["training"]["steps"] = 400
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))

    def start(*overrides: str) -> list[subprocess.Popen[str]]:
        port = str(_free_port())
        arguments = [str(tmp_path / "logs"), "1", "--", "train", str(config), *overrides]
        nodes = {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [start_agent(arguments, SLURM_NODEID=str(node), **nodes) for node in range(2)]

    agents = start()
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics_so_far(run)) < 3:
        assert time.monotonic() < deadline and agents[0].poll() is None, agents[0].communicate()
        time.sleep(0.1)
    agents[1].send_signal(signal.SIGUSR1)
    output = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [75, 75], output
    steps = [entry["step"] for entry in read_metrics(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < 400

    agents = start(f"training.steps={len(steps) + 3}")
    output = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], output
    assert [entry["step"] for entry in read_metrics(run)] == list(range(1, len(steps) + 4))
    assert output[1] == ("", "")


@pytest.mark.slow
def test_a_killed_rank_of_the_trainer_is_the_first_error(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tree = small_config(run, write_text(tmp_path / "text.jsonl"))
    tree["training"]["steps"] = 4000
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    nodes = {"SLURM_STEP_NUM_NODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    arguments = [str(tmp_path / "logs"), "1", "--", "train", str(config)]
    agents = [start_agent(arguments, SLURM_NODEID=str(node), **nodes) for node in range(2)]
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_metrics_so_far(run)) < 3:
        assert time.monotonic() < deadline and agents[0].poll() is None, agents[0].communicate()
        time.sleep(0.1)
    log = (tmp_path / "logs" / "rank-00001.log").read_text()
    os.kill(int(log.partition("pid ")[2].partition(",")[0]), signal.SIGKILL)
    output = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [137, 137], output
    error = first_error(tmp_path / "logs")
    assert error is not None and error.rank == 1
    assert error.how == "was killed by signal 9 (SIGKILL, out of memory?)"


def read_metrics_so_far(run: Path) -> list[str]:
    return (run / "metrics.jsonl").read_text().splitlines()
