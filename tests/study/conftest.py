"""The SLURM cluster of the launch tests."""

from tests.launch.conftest import session_cluster, slurm_cluster

__all__ = ["session_cluster", "slurm_cluster"]
