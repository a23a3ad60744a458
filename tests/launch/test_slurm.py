"""What is read from SLURM's commands."""

from __future__ import annotations

import pytest

from mf_train.launch.slurm import _environment, _parse_job, _words

LINE = (
    "JobId=12 ArrayJobId=10 ArrayTaskId=3-5,9%2 JobName=a JobState=FAILED name UserId=root(0) Priority=1 "
    "JobState=PENDING Reason=Resources Dependency=(null) Requeue=1 Restarts=2 RunTime=00:00:00 TimeLimit=00:10:00 "
    "StartTime=2026-01-02T03:04:05 EndTime=Unknown NodeList=(null) NumNodes=2-2 "
    "Command=/a b/JobState=RUNNING Comment=x"
)


def test_a_job_named_to_confuse() -> None:
    job = _parse_job(LINE)
    assert (job.number, job.state, job.reason, job.restarts) == ("12", "PENDING", "Resources", "2")
    assert (job.nodes, job.end_time) == ("", "")
    assert job.active and job.tasks == {3, 4, 5, 9}


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            "sbatch: error: invalid partition specified: x\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "invalid partition specified: x; Invalid partition name specified",
        ),
        ("sbatch: error: Batch job submission failed: Invalid account\n", "Invalid account"),
        (
            "sbatch: unrecognized option '--x'\nTry \"sbatch --help\"\n",
            "unrecognized option '--x'; Try \"sbatch --help\"",
        ),
        ("", "no reason given"),
    ],
)
def test_a_complaint_is_one_line(told: str, words: str) -> None:
    assert _words(told) == words


def test_what_the_shell_says_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch lets its variables win over the script: those that would change what the script relies on are left out."""
    kept, dropped = ["SBATCH_PARTITION", "SLURM_CONF", "SLURM_JWT"], ["SBATCH_SIGNAL", "SLURM_JOB_ID", "RANK"]
    for name in kept + dropped:
        monkeypatch.setenv(name, "x")
    assert [name for name in kept + dropped if name in _environment()] == kept
