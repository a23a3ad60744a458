"""A real SLURM cluster on one machine: munged, slurmctld, and six nodes in namespaces of their own.

Needs root, Debian's slurm-wlm and munge, and iproute2. Every node has its own network (a veth pair on a bridge),
host name, mounts and process ids, so host names, rendezvous and signals behave as on a cluster. n1 to n4 are in the
default partition `main` and in `urgent`, whose jobs preempt those of `main`; g1 and g2, partition `gpu`, have GPUs by
SLURM's books. Nodes can be powered off and cut off. Everything that is started dies with the process that started
it. Up to SLOTS clusters at a time, each with a lock, and names, addresses and ports of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mf_train.parallel.launcher import end_with_parent

PROGRAMS = "munged slurmctld slurmd sbatch squeue scontrol scancel ip unshare nsenter".split()
LOCKS = Path("/run/lock")
SLOTS = 3
CPUS, MEMORY_MB = 4, 16000  # of every node, as configured: they need not exist
GRACE = 20  # seconds that a preempted job has
FINISHED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT".split()

SLURM_CONF = """\
ClusterName=mftest
SlurmctldHost={host}({network}.254)
SlurmctldPort={port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=10
MinJobAge=3600
SlurmdTimeout=8
MessageTimeout=8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=n[1-4] NodeAddr={network}.[1-4] CPUs={cpus} RealMemory={memory} State=UNKNOWN
NodeName=g[1-2] NodeAddr={network}.[5-6] CPUs={cpus} RealMemory={memory} Gres=gpu:h100:2 State=UNKNOWN
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={grace} State=UP
PartitionName=urgent Nodes=n[1-4] Default=NO MaxTime=INFINITE PriorityTier=2 PreemptMode=OFF State=UP
PartitionName=gpu Nodes=g[1-2] Default=NO MaxTime=INFINITE State=UP
"""
# Devices that every machine has stand for GPUs: SLURM only hands out their numbers.
GRES_CONF = """\
NodeName=g[1-2] Name=gpu Type=h100 File=/dev/zero
NodeName=g[1-2] Name=gpu Type=h100 File=/dev/null
"""
NODES = {name: i for i, name in enumerate(("n1", "n2", "n3", "n4", "g1", "g2"), start=1)}

# What a node runs as its process 1; $1 is the cluster's folder, $2 the node's name.
NODE = """
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
mount -t tmpfs tmpfs /dev/shm
exec slurmd -D -N "$2"
"""


def why_not() -> str | None:
    """The reason why no cluster can run on this machine, or None."""
    if os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return (
            f"missing {', '.join(missing)}: apt-get install --no-install-recommends slurm-wlm munge iproute2"
        )
    if subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"], capture_output=True
    ).returncode:
        return "this machine does not let root make namespaces"
    return None


class Cluster:
    """A running cluster; `environment` makes SLURM's commands speak to it."""

    def __init__(self, folder: Path, slot: int) -> None:
        self.folder = folder
        self.slot = slot
        self.bridge, self.network = f"mfs{slot}", f"10.77.{20 + slot}"
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # jobs

    def run(self, *command: str | Path, cwd: Path | None = None, timeout: float = 30) -> str:
        """Runs a command against the cluster and returns what it printed."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *arguments: str | Path, cwd: Path, **variables: str) -> int:
        """`sbatch arguments` with environment variables; returns the job's number."""
        settings = [f"{name}={value}" for name, value in variables.items()]
        return int(self.run("env", *settings, "sbatch", "--parsable", *arguments, cwd=cwd))

    def job(self, number: int | str) -> dict[str, str]:
        """What `scontrol show job` tells, by its keys (JobState, ExitCode, Restarts ...); of an array, its first."""
        lines = self.run("scontrol", "--oneliner", "show", "job", str(number)).splitlines()
        return dict(word.split("=", 1) for word in lines[0].split() if "=" in word)

    def wait_for_end(self, number: int | str, timeout: float) -> dict[str, str]:
        """Waits until the job has finished for good; returns its `job`."""
        deadline = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in FINISHED:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']} after {timeout:g} s"
            time.sleep(0.2)
        return job

    # nodes

    def kill(self, node: str) -> None:
        """Powers a node off: all its processes end at once, and nobody is told, since its link goes first."""
        _ip("link", "del", self.link(node))
        daemon = self._daemons.pop(node)
        for first in _children(daemon.pid):  # the node's process 1, which takes all others with it
            os.kill(first, signal.SIGKILL)
        daemon.wait(10)
        _ip("netns", "del", self.link(node))

    def start(self, node: str) -> None:
        """Boots a node that was powered off; it is there when SLURM has seen it (wait_until_idle)."""
        self._connect(node)
        self._boot(node)

    def cut(self, node: str) -> None:
        """Takes a node's link down: its processes live on, and nobody reaches it. run_on still does."""
        _ip("link", "set", self.link(node), "down")

    def heal(self, node: str) -> None:
        """Takes the link of a node that was cut off up again."""
        _ip("link", "set", self.link(node), "up")

    def run_on(self, node: str, *command: str | Path, timeout: float = 30) -> str:
        """Runs a command inside a node, by its process 1 and not over its network; returns what it printed."""
        (first,) = _children(self._daemons[node].pid)
        return self.run("nsenter", f"--target={first}", "-n", "-u", "-m", "-p", *command, timeout=timeout)

    def restore(self, timeout: float = 60) -> None:
        """Cancels all jobs, heals and starts all nodes, and waits until they are idle."""
        self.run("scancel", "--full", "--user=root")
        for node in NODES:
            if node in self._daemons and self._daemons[node].poll() is None:
                self.heal(node)
            else:
                if node in self._daemons:
                    self.kill(node)
                self.start(node)
        told = self.run("sinfo", "--noheader", "--Node", "--states=drain,down", "--format=%N %t")
        for line in dict.fromkeys(told.splitlines()):
            if not line.endswith("*"):  # those that answer, but were taken out of use
                self.run("scontrol", "update", f"NodeName={line.split()[0]}", "State=RESUME")
        self.wait_until_idle(timeout)

    def wait_until_idle(self, timeout: float, nodes: set[str] | None = None) -> None:
        """Waits until these nodes, or all, are idle; raises AssertionError with the daemons' logs."""
        deadline = time.monotonic() + timeout
        while True:
            told = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--format=%N %t"],
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=30,
            )
            states = dict(line.split() for line in told.stdout.splitlines())
            if all(states.get(node) == "idle" for node in nodes or NODES):
                return
            if time.monotonic() > deadline:
                logs = "".join(
                    f"-- {path.name}\n{path.read_text(errors='replace')[-2000:]}"
                    for path in sorted((self.folder / "log").iterdir())
                )
                raise AssertionError(
                    f"the cluster is not idle after {timeout:g} s\n{told.stdout}{told.stderr}{logs}"
                )
            time.sleep(0.1)

    # its network

    def link(self, node: str) -> str:
        """The name of a node's network namespace, and of the end of its link that is on this host."""
        return f"{self.bridge}{node}"

    def _make_network(self) -> None:
        """A bridge on this host, and for each node a network namespace with one end of a veth pair on it."""
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.network}.254/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for node in NODES:
            self._connect(node)

    def _connect(self, node: str) -> None:
        link = self.link(node)
        _ip("netns", "add", link)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", link)
        _ip("link", "set", link, "master", self.bridge, "up")
        _ip("-n", link, "link", "set", "lo", "up")
        _ip("-n", link, "addr", "add", f"{self.network}.{NODES[node]}/24", "dev", "eth0")
        _ip("-n", link, "link", "set", "eth0", "up")

    def remove_network(self) -> None:
        """Removes what _make_network made, or a part of it."""
        # Links go first: a connection that was not closed keeps a namespace, and its link, for minutes.
        for link in sorted(Path("/sys/class/net").glob(f"{self.bridge}*"), reverse=True):
            subprocess.run(["ip", "link", "del", link.name], capture_output=True, timeout=30)
        for line in _ip("netns", "list").splitlines():
            if line.startswith(self.bridge):
                _ip("netns", "del", line.split()[0])

    # all of it

    def up(self) -> None:
        """Starts everything and waits until all nodes are idle."""
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("munge", "state", "spool", "log"):
            (folder / name).mkdir(parents=True)
        hosts = {"127.0.0.1": "localhost", f"{self.network}.254": host}
        hosts |= {f"{self.network}.{i}": name for name, i in NODES.items()}
        (folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts.items()))
        (folder / "slurm.conf").write_text(
            SLURM_CONF.format(
                folder=folder,
                host=host,
                network=self.network,
                port=17927 + 2 * self.slot,
                node_port=17928 + 2 * self.slot,
                cpus=CPUS,
                memory=MEMORY_MB,
                grace=GRACE,
            )
        )
        (folder / "gres.conf").write_text(GRES_CONF)
        self._make_network()

        munge = folder / "munge"
        key = munge / "key"
        key.touch(0o400)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            (folder / "spool" / node).mkdir()
            self._boot(node)
        self.wait_until_idle(30)

    def _boot(self, node: str) -> None:
        space = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        shell = ["bash", "-c", NODE, "node", str(self.folder), node]
        self._start(node, "nsenter", f"--net=/run/netns/{self.link(node)}", *space, *shell)

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.console", "ab") as console:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                preexec_fn=end_with_parent,
            )

    def down(self) -> None:
        """Ends every process of the cluster and removes its network."""
        for name, daemon in reversed(self._daemons.items()):
            if name in NODES:
                for first in _children(daemon.pid):
                    os.kill(first, signal.SIGKILL)
            else:
                daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.remove_network()


@contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster, gone afterwards. Waits up to 5 minutes while others have taken all slots."""
    with _free_slot(300) as slot:
        cluster = Cluster(folder, slot)
        cluster.remove_network()  # what a killed predecessor may have left
        try:
            cluster.up()
            yield cluster
        finally:
            cluster.down()


def _children(process: int) -> list[int]:
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@contextmanager
def _free_slot(timeout: float) -> Iterator[int]:
    """The number of a slot that is nobody else's meanwhile."""
    deadline = time.monotonic() + timeout
    while True:
        for slot in range(SLOTS):
            with open(LOCKS / f"mf-slurm-cluster-{slot}", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield slot
                return
        assert time.monotonic() < deadline, f"{SLOTS} other SLURM clusters are running (locks in {LOCKS})"
        time.sleep(0.5)
