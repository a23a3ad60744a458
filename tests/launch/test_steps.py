"""Trainers that are started by hand with srun, without `memoryformer launch`: steps of one job beside each other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster
from tests.launch.drills import REPOSITORY, drill_config
from tests.training.runs import read_metrics, write_config

pytestmark = pytest.mark.slurm


def test_steps_beside_each_other(slurm_cluster: Cluster, text: Path, tmp_path: Path) -> None:
    """Two of one task on one node, one of two tasks on other nodes than the job's first, and none finds scontrol."""
    lines = ["#!/bin/bash"]
    for name, options, tensor in (
        ("first", "--ntasks=1 --nodes=1 --nodelist=n2", 1),
        ("second", "--ntasks=1 --nodes=1 --nodelist=n2", 1),
        ("third", "--ntasks=2 --nodes=2 --nodelist=n2,n3", 2),
    ):
        tree = drill_config(tmp_path / name, text, steps=2)
        tree["parallel"] = {"tensor": tensor}
        config = write_config(tree)
        lines.append(
            f"srun --overlap {options} env PATH=/nowhere {sys.executable} -m mf_train train {config} "
            f">{tmp_path}/{name}.txt 2>&1 &"
        )
    script = tmp_path / "job.sh"
    script.write_text("\n".join([*lines, "wait", ""]))
    job = slurm_cluster.submit(
        "--nodes=3",
        "--nodelist=n1,n2,n3",
        script,
        cwd=tmp_path,
        PYTHONPATH=str(REPOSITORY),
        OMP_NUM_THREADS="1",
    )
    slurm_cluster.wait_for_end(job, 180)
    for name in ("first", "second", "third"):
        printed = (tmp_path / f"{name}.txt").read_text()
        assert "done: 2 steps" in printed, printed
        assert [row["step"] for row in read_metrics(tmp_path / name)] == [1, 2]
