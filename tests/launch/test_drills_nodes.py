"""Real runs on a real SLURM cluster whose nodes and storage fail: powered off, cut off, frozen."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.conftest import Drill, MakeRun
from tests.launch.drills import INTERVAL, SEEN_SECONDS, START_SECONDS, Run, same_files

Reference = Callable[..., Run]

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LIMIT = 30  # seconds without progress after which ranks give up


@pytest.mark.parametrize(("node", "moment"), [("n2", "training"), ("n1", "saving")])
def test_node_powered_off(
    make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster, node: str, moment: str
) -> None:
    """A node is powered off, and another takes its place; n1 has the batch script."""
    run = make_run(training={"collective_timeout_seconds": LIMIT})
    run.launch()
    if moment == "training":
        run.wait_for_steps(6)
    else:
        run.wait_for_save(2 * INTERVAL)
    event = time.monotonic()
    slurm_cluster.kill(node)
    drill.recovered(run, event, SEEN_SECONDS + START_SECONDS)
    assert run.finish()["Restarts"] == "1", run.output()
    start = run.starts()[-1]
    assert start.processes == 4 and node not in run.rank_log(start).split()[3]
    drill.lost(run, INTERVAL)
    run.check_end(reference())


@pytest.mark.parametrize(("node", "nodes"), [("n1", 2), ("n1", 1)], ids=["n1", "all"])
def test_node_cut_off(
    make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster, node: str, nodes: int
) -> None:
    """A node is cut off and its processes live on: they write nothing once the run goes on elsewhere, nor when healed.

    A run of one node goes on training there as if nothing were, until it would save or is overtaken.
    """
    steps = 200 if nodes == 1 else 24  # more than the old start does until the new one takes over
    run = make_run(steps=steps, training={"collective_timeout_seconds": LIMIT})
    run.launch(nodes=nodes)
    old = run.wait_for_steps(6)
    ranks = [rank for rank in map(run.rank, range(2 * nodes)) if rank.node == node]
    event = time.monotonic()
    slurm_cluster.cut(node)
    drill.recovered(run, event, SEEN_SECONDS + START_SECONDS)
    overtaken = len(run.steps(old))
    run.finish(60 + steps)
    files = same_files(run.folder)
    living = [
        rank for rank in ranks if f"{rank.pid}" in slurm_cluster.run_on(node, "ps", "-eo", "pid=").split()
    ]
    print(f"{len(living)} of {len(ranks)} old ranks still live; steps after the new start: ", end="")
    print(len(run.steps(old)) - overtaken)
    slurm_cluster.heal(node)
    slurm_cluster.wait_until_idle(90)
    assert same_files(run.folder) == files
    drill.lost(run, 2 * INTERVAL if nodes == 1 else INTERVAL)
    run.check_end(reference(steps=steps, nodes=nodes))


@pytest.mark.parametrize(("node", "left"), [("n1", "n2"), ("n2", "n1")])
def test_elastic(
    make_run: MakeRun, reference: Reference, drill: Drill, slurm_cluster: Cluster, node: str, left: str
) -> None:
    """--elastic 1:2: a node is powered off, no other is free, and the run goes on with one."""
    slurm_cluster.run("scontrol", "update", "NodeName=n[3-4]", "State=DRAIN", "Reason=drill")
    run = make_run(training={"collective_timeout_seconds": LIMIT})
    run.launch("--elastic=1:2")
    run.wait_for_steps(6)
    event = time.monotonic()
    slurm_cluster.kill(node)
    drill.recovered(run, event, SEEN_SECONDS + START_SECONDS)
    assert run.finish()["Restarts"] == "1", run.output()
    assert [(start.nodes, start.processes) for start in run.starts()] == [("n[1-2]", 4), (left, 2)]
    drill.lost(run, INTERVAL)
    run.check_end(reference(), relative=1e-5)


class Storage:
    """A file system of its own for a folder, on all nodes and here: one device, shared as a cluster's storage is."""

    def __init__(self, cluster: Cluster, folder: Path, image: Path) -> None:
        self.cluster, self.folder = cluster, folder
        image.touch()
        subprocess.run(["truncate", "--size=512M", image], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        self.device = subprocess.check_output(["losetup", "--find", "--show", image], text=True).strip()
        folder.mkdir(parents=True)
        subprocess.run(["mount", self.device, folder], check=True)
        (folder / "lost+found").rmdir()
        for node in ("n1", "n2", "n3", "n4"):
            cluster.run_on(node, "mount", self.device, folder)

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "--freeze", self.folder], check=True, timeout=30)

    def thaw(self) -> None:
        subprocess.run(["fsfreeze", "--unfreeze", self.folder], capture_output=True, timeout=30)

    def remove(self) -> None:
        self.thaw()
        self.cluster.restore()  # its jobs use it
        for node in ("n1", "n2", "n3", "n4"):
            self.cluster.run_on(node, "umount", self.folder)
        subprocess.run(["umount", self.folder], check=True)
        subprocess.run(["losetup", "--detach", self.device], check=True)


@pytest.fixture
def storage(slurm_cluster: Cluster, tmp_path: Path) -> Iterator[Storage]:
    """The folder of the checkpoints of a run named `run`. Skips where this machine has no loop devices."""
    if subprocess.run(["losetup", "--find"], capture_output=True).returncode:
        pytest.skip("no loop device: a file system that hangs needs one of its own")
    storage = Storage(slurm_cluster, tmp_path / "run" / "checkpoints", tmp_path / "image")
    yield storage
    storage.remove()


def test_storage_hangs(make_run: MakeRun, reference: Reference, drill: Drill, storage: Storage) -> None:
    """The checkpoints' storage hangs: named within the limit, and the run goes on when storage answers again."""
    run = make_run(training={"collective_timeout_seconds": LIMIT})
    run.launch()
    run.wait_for_steps(6)
    storage.freeze()
    event = time.monotonic()
    said = re.compile(r"no progress for \d+ s: (rank \d+ on n\d|all 4 ranks) .*step-?\s?\d+")
    run.wait_until(lambda: said.search(run.output()) is not None, "name of what hangs", 3 * LIMIT)
    print(f"named after {time.monotonic() - event:.0f} s: {said.search(run.output())}")
    time.sleep(15)  # in which the start ends, as far as it can: nothing ends a process that waits for storage
    storage.thaw()
    event = time.monotonic()
    drill.recovered(run, event, START_SECONDS + 60)
    run.finish()
    drill.lost(run, 2 * INTERVAL)
    run.check_end(reference())
