"""`memoryformer launch --check` on a real SLURM cluster: well, with a slow network, another package, a lost node."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import mf_train
from mf_train.config import Config
from mf_train.config.loading import load_config
from mf_train.errors import UserError
from mf_train.launch.check import check
from mf_train.launch.options import JobOptions
from tests.launch.cluster import Cluster

pytestmark = pytest.mark.slurm

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def cluster(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The cluster, to which this process's SLURM commands speak."""
    monkeypatch.setenv("SLURM_CONF", slurm_cluster.environment["SLURM_CONF"])
    return slurm_cluster


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A model of 176 MB a checkpoint, whose run's folder is not there yet."""
    return load_config(
        REPOSITORY / "configs" / "quickstart.yaml", [f"training.output_dir={tmp_path / 'runs' / 'run'}"]
    )


def row(text: str, name: str) -> list[str]:
    """The cells of a node's row: GPUs, copy, inside, across, to next, write, read, seen, clock, memory."""
    (line,) = re.findall(rf"^[ !] {name} .*$", text, re.MULTILINE)
    return str(line).split()[1:] if line.startswith(" ") else str(line).split()[2:]


def allocate(cluster: Cluster, nodes: int, *options: str) -> str:
    """The number of a job that holds nodes and runs nothing."""
    done = subprocess.run(
        ["salloc", "--no-shell", f"--nodes={nodes}", "--time=10", *options],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    (number,) = re.findall(r"Granted job allocation (\d+)", done.stderr)
    return str(number)


def python_by_node(folder: Path, node: str, there: str) -> str:
    """A python that is `there`, a shell command, on one node."""
    path = folder / "python"
    path.write_text(f'#!/bin/bash\n[[ $SLURMD_NODENAME == {node} ]] && {there}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_measures_nodes_of_its_own_and_leaves_nothing(
    cluster: Cluster, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(config, JobOptions(nodes=2, tasks_per_node=2)) == 0
    text = capsys.readouterr().out
    for name in ("n1", "n2"):
        gpus, copy, inside, across, *_ = row(text, name)
        assert gpus == "0"
        assert all(float(rate) > 0 for rate in (copy, inside, across))
    assert "A checkpoint (0.176 GB) takes about" in text
    assert "verdict: 2 nodes, fit for this run" in text
    assert max(map(len, text.splitlines())) <= 120
    assert cluster.run("squeue", "--noheader", "--states=running,pending") == ""
    assert not (tmp_path / "runs" / "run").exists()


def test_names_the_node_whose_package_differs(
    cluster: Cluster, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "mf_train"
    shutil.copytree(Path(mf_train.__file__).parent, other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "errors.py").write_text(
        (other / "errors.py").read_text() + "\n# a fix that only this node has\n"
    )
    python = python_by_node(tmp_path, "n3", f"export PYTHONPATH={other.parent}")
    run = Path(config.training.output_dir)
    (run / "launch").mkdir(parents=True)
    (run / "launch" / "kept").touch()
    assert check(config, JobOptions(nodes=3, tasks_per_node=1, python=python)) == 1
    text = capsys.readouterr().out
    assert re.search(r"FAIL  n3: the sources of mf_train \(digest\): \w{12}; 2 others have \w{12}", text)
    assert text.count("FAIL") == 1
    assert "verdict: n3 stands out" in text
    assert [path.name for path in (run / "launch").iterdir()] == ["kept"]


def test_passes_on_why_there_are_no_nodes(cluster: Cluster, config: Config) -> None:
    with pytest.raises(UserError, match=r"salloc: .*invalid partition.*partitions here: main, urgent, gpu"):
        check(config, JobOptions(nodes=2, tasks_per_node=1, partition="no-such"))
    assert not Path(config.training.output_dir).exists()


@pytest.mark.slow
def test_names_nodes_whose_gpus_torch_does_not_see(
    cluster: Cluster, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(config, JobOptions(nodes=2, gpus_per_node=2, partition="gpu")) == 1
    text = capsys.readouterr().out
    assert "FAIL  g1: sees 0 of 2 GPUs" in text and "FAIL  g2: sees 0 of 2 GPUs" in text
    assert "in 'node': UserError: local rank" in text


@contextmanager
def slowed(cluster: Cluster, node: str) -> Iterator[None]:
    """A node's link carries 100 Mbit/s in each direction, instead of what memory does."""
    link = cluster.link(node)
    ends = [["tc", "qdisc"], ["tc", "-n", link, "qdisc"]]
    devices, limit = [link, "eth0"], "root tbf rate 100mbit burst 256kb latency 50ms".split()
    for end, device in zip(ends, devices, strict=True):
        made = subprocess.run([*end, "add", "dev", device, *limit], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"this kernel cannot slow a link down: {made.stderr.strip()}")
    try:
        yield
    finally:
        for end, device in zip(ends, devices, strict=True):
            subprocess.run([*end, "del", "dev", device, "root"], capture_output=True)


@pytest.mark.slow
def test_names_the_node_with_a_slow_network_from_inside_a_job(
    cluster: Cluster, config: Config, tmp_path: Path
) -> None:
    """All four nodes of a job of its own, whose batch script calls the check."""
    program = (
        "import sys; from mf_train.launch.check import check; from mf_train.launch.options import JobOptions; "
        "from mf_train.config.loading import load_config; "
        "sys.exit(check(load_config(sys.argv[1], sys.argv[2:]), JobOptions(nodes=4, tasks_per_node=1)))"
    )
    script = tmp_path / "script"
    overrides = f"training.output_dir={config.training.output_dir}"
    script.write_text(
        f"#!/bin/bash\nexec {sys.executable} -c '{program}' configs/quickstart.yaml {overrides}\n"
    )
    output = tmp_path / "output"
    with slowed(cluster, "n2"):
        number = cluster.submit(
            "--nodes=4",
            "--ntasks-per-node=1",
            f"--output={output}",
            script,
            cwd=REPOSITORY,
            PYTHONPATH=str(REPOSITORY),
        )
        job = cluster.wait_for_end(number, 120)
    text = output.read_text()
    assert job["ExitCode"] == "1:0", text
    assert "FAIL  n2: its network is slow" in text
    assert "verdict: n2 stands out" in text
    assert float(row(text, "n2")[4]) < 0.013 < float(row(text, "n3")[4])  # 100 Mbit/s are 0.0125 GB/s


@pytest.mark.slow
def test_names_a_node_that_is_cut_off_in_bounded_time(
    cluster: Cluster, config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", allocate(cluster, 4, "--no-kill"))
    cluster.cut("n3")
    before = time.monotonic()
    assert check(config, JobOptions(nodes=4, tasks_per_node=1)) == 1
    assert time.monotonic() - before < 120
    text = capsys.readouterr().out
    assert "FAIL  n3: no program could be started there in time" in text
    assert "verdict: n3 stands out" in text
    assert all(float(row(text, name)[1]) > 0 for name in ("n1", "n2", "n4"))  # the others are measured


@pytest.mark.slow
def test_names_a_node_that_hangs(
    cluster: Cluster, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = python_by_node(tmp_path, "n2", "exec sleep 600")
    before = time.monotonic()
    assert check(config, JobOptions(nodes=3, tasks_per_node=1, python=python)) == 1
    assert time.monotonic() - before < 150
    text = capsys.readouterr().out
    assert "FAIL  n2: sent nothing: it hangs or was killed" in text
    assert "verdict: n2 stands out" in text
    assert cluster.run("squeue", "--noheader", "--states=running,pending") == ""
