"""The cluster that the SLURM tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, running_cluster, why_not


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """A SLURM cluster: n1 and n2 in the default partition, g1 and g2 with 2 GPUs each in partition gpu.

    Skips where none can run.
    """
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(
        tempfile.mkdtemp(prefix="slurm-")
    )  # short: it holds a socket, whose path may have 107 bytes
    try:
        with running_cluster(folder) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)
