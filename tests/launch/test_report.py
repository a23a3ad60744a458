"""How a start ended, and its first error, found in logs that were made up after real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mf_train.errors import UserError
from mf_train.launch.logs import (
    Ending,
    format_ending,
    format_request,
    format_time,
    rank_log,
    stop_file,
)
from mf_train.launch.report import first_error, judge, report
from tests.training.runs import REPOSITORY, environment

START = 1_800_000_000.0
LOST = (
    "memoryformer: rank 0, or torchrun's agent, at n1:10123 has gone; rank 1 on n1 was training step 7; run the same "
    "command again to resume"
)
GLOO = [
    "Traceback (most recent call last):",
    '  File "run.py", line 1, in <module>',
    "RuntimeError: [../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4242",
]
VERDICT = (
    "memoryformer: no progress for 60 s: rank 3 on n2 does not answer, last seen 61 s ago, training step 7"
)
OWN = [
    "Traceback (most recent call last):",
    '  File "run.py", line 1, in <module>',
    "ValueError: loss of step 7 is NaN",
]


class Logs:
    """A folder of logs; rank r runs on host n(r // 2 + 1). Times are seconds after the start."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def rank(
        self,
        rank: int,
        lines: list[str],
        status: int | None = None,
        after: float = 0.0,
        note: str = "",
        asked: bool = False,
    ) -> None:
        path = rank_log(self.folder, rank)
        host = f"n{rank // 2 + 1}"
        text = [
            f"rank {rank} on {host} started at {format_time(START)}: pid 7, python 3.11",
            "memoryformer: 0.3 M parameters, 0.1 M in tables",
            "step 1/12  loss 8.3",
            *lines,
        ]
        if asked:
            text.append(format_request(rank, host, signal.SIGTERM))
        if status is not None:
            text.append(format_ending(Ending(rank, host, status, START + after, note)))
        path.write_text("\n".join(text) + "\n")
        os.utime(path, (START + after, START + after))

    def node(self, node: int, lines: list[str]) -> None:
        (self.folder / f"node-{node:03d}.log").write_text("\n".join(lines) + "\n")


@pytest.fixture
def logs(tmp_path: Path) -> Logs:
    return Logs(tmp_path)


# by rank: a status, or "lost"
@pytest.mark.parametrize(
    ("ends", "starter", "outcome"),
    [
        ((0, 0), 0, 0),
        ((0, 0), 1, 0),  # the ranks know best: torchrun ended with a traceback after a TERM
        ((0, 75), 0, 75),
        ((75, 75), 1, 75),
        ((75, 2), 75, 2),  # srun's is the greatest
        ((75, 1), 75, 1),
        ((137, 0, 75), 1, 137),
        ((143, 143), 143, 75),  # asked to end before they listened
        ((143, 2), 143, 2),
        (("lost", 75), 75, 1),
        (("lost", 0), 0, 1),
        (("lost", 0), 137, 137),
        (("lost", "lost"), 6, 6),
        ((0, 0, "no log"), 0, 1),
        (("no log", "no log"), 127, 127),
    ],
)
def test_the_outcome(logs: Logs, ends: tuple[int | str, ...], starter: int, outcome: int) -> None:
    for rank, end in enumerate(ends):
        if end != "no log":
            logs.rank(rank, [], None if isinstance(end, str) else end)
    status, lines = judge(logs.folder, len(ends), starter)
    assert status == outcome
    assert [line[:12] for line in lines[:1]] == ["first error:"] * (outcome not in (0, 75))


def test_ranks_that_were_asked_to_stop_before_they_trained_lose_nothing(logs: Logs) -> None:
    """Rank 1 listened already and waited for rank 0, which did not: its starter had to kill it."""
    logs.rank(0, [], 138)
    logs.rank(1, [], asked=True)
    assert judge(logs.folder, 2, 137)[0] == 137
    stop_file(logs.folder).touch()
    assert judge(logs.folder, 2, 137)[0] == 75
    logs.rank(2, OWN, 1)
    assert judge(logs.folder, 3, 137)[0] == 1


def test_a_rank_s_own_error_comes_before_those_who_lost_it_earlier(logs: Logs) -> None:
    """Clocks differ a little: the broken connection may have the earlier time."""
    logs.rank(0, GLOO, 1, after=9.8)
    logs.rank(1, [LOST], 1, after=9.9)
    logs.rank(2, OWN, 1, after=10.0)
    logs.rank(3, GLOO, 1, after=12.0)
    error = first_error(logs.folder)
    assert error is not None
    assert (error.rank, error.host, error.time) == (2, "n2", START + 10)
    assert error.lines == OWN
    assert error.path == rank_log(logs.folder, 2)
    assert report(logs.folder) == [
        f"first error: rank 2 on n2 ended with status 1 at {format_time(START + 10)}",
        *(f"    {line}" for line in OWN),
        "  ranks 0-1, 3: ended with status 1, 0 to 2 s later",
        f"  log: {rank_log(logs.folder, 2)} (and 3 of other ranks beside it)",
    ]


def test_of_two_own_errors_the_earlier_is_the_first(logs: Logs) -> None:
    logs.rank(0, OWN, 1, after=11)
    logs.rank(1, ["memoryformer: /data: No space left on device"], 1, after=10)
    error = first_error(logs.folder)
    assert error is not None and error.rank == 1
    assert error.lines == ["memoryformer: /data: No space left on device"]


def test_a_killed_rank(logs: Logs) -> None:
    logs.rank(0, [LOST], 1, after=12)
    logs.rank(1, GLOO, 1, after=11)
    logs.rank(2, ["step 6/12", "step 7/12"], 137, after=10, note="out of memory?")
    logs.rank(3, [], after=1, asked=True)  # and killed by its starter
    assert report(logs.folder) == [
        f"first error: rank 2 on n2 was killed by signal 9 (SIGKILL, out of memory?) at {format_time(START + 10)}",
        "    memoryformer: 0.3 M parameters, 0.1 M in tables",
        "    step 1/12  loss 8.3",
        "    step 6/12",
        "    step 7/12",
        "  ranks 0-1: ended with status 1, 1 to 2 s later",
        "  rank 3: no ending: killed, or the node has gone",
        f"  log: {rank_log(logs.folder, 2)} (and 3 of other ranks beside it)",
    ]


def test_the_watch_s_verdict_comes_before_ends_without_a_word(logs: Logs) -> None:
    logs.rank(0, [VERDICT], 1, after=70)
    logs.rank(1, [], 1, after=69)
    logs.rank(3, [], after=1, asked=True)
    error = first_error(logs.folder)
    assert error is not None and (error.rank, error.lines) == (0, [VERDICT])


def test_under_srun_the_watch_leaves_no_endings(logs: Logs) -> None:
    logs.rank(0, [VERDICT], after=70)
    for rank in (1, 2, 3):
        logs.rank(rank, [], after=60)
    error = first_error(logs.folder)
    assert error is not None and (error.rank, error.lines) == (0, [VERDICT])


def test_steps_after_the_watch_s_verdict(logs: Logs) -> None:
    """The ranks go on for as long as the others need to see it."""
    logs.rank(0, [VERDICT, *(f"step {number}/12  loss 8.1" for number in range(2, 9))], 1, after=71)
    logs.rank(1, [], 1, after=70)
    logs.rank(2, [], 1, after=73)
    assert report(logs.folder)[:-1] == [
        f"first error: rank 0 on n1 ended with status 1 at {format_time(START + 71)}",
        f"    {VERDICT}",
        "  ranks 1-2: ended with status 1, 1 s before to 2 s later",
    ]


def test_an_error_that_the_run_outlived_is_none(logs: Logs) -> None:
    logs.rank(0, [*OWN, "step 2/12  loss 8.2"], 0)
    logs.rank(1, [*OWN, "step 2/12  loss 8.2"], 75)
    assert first_error(logs.folder) is None
    logs.rank(2, [*OWN, "step 2/12  loss 8.2"], 137)
    error = first_error(logs.folder)
    assert error is not None and (error.rank, error.lines[-1]) == (2, "step 2/12  loss 8.2")


def test_a_rank_that_left_no_ending_comes_before_those_that_lost_their_connection(logs: Logs) -> None:
    logs.rank(0, GLOO, 1, after=10)
    logs.rank(1, [], 1, after=10)
    logs.rank(2, ["step 7/12"], after=8)
    logs.rank(3, ["step 7/12"], after=9)
    lines = report(logs.folder)
    assert lines[0] == (
        "first error: rank 2 on n2 left no ending (killed, or its node has gone), and last wrote at "
        f"{format_time(START + 8)}"
    )
    assert "  rank 3: no ending: killed, or the node has gone" in lines


def test_ranks_stopped_and_done_are_no_errors(logs: Logs) -> None:
    logs.rank(0, ["memoryformer: warning of no weight"], 75, after=5)
    logs.rank(1, [], 0, after=5)
    assert first_error(logs.folder) is None
    assert report(logs.folder) == [
        f"no error in the logs of {logs.folder}",
        "  rank 0: ended with status 75",
        "  rank 1: ended with status 0",
    ]


def test_what_kept_ranks_from_starting_is_in_the_logs_of_their_nodes(logs: Logs) -> None:
    logs.node(1, ["/usr/bin/python: No module named mf_train"])
    error = first_error(logs.folder, 4)
    assert error is not None
    assert (error.rank, error.host, error.how) == (None, "node-001", "failed")
    assert error.lines == ["/usr/bin/python: No module named mf_train"]
    assert error.path == logs.folder / "node-001.log"
    logs.node(
        0, [*GLOO[:2], "torch.distributed.DistStoreError: Timed out after 301 seconds waiting for clients."]
    )
    assert "Timed out after 301 seconds" in report(logs.folder, 4)[3]
    for rank in range(4):  # torchrun says as well that its ranks failed: they know better
        logs.rank(rank, OWN, 1)
    error = first_error(logs.folder, 4)
    assert error is not None and error.rank == 0


TORCHRUNS_END = [
    "E1129 15:46:31.507 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: -9) local_rank: 1",
    "Traceback (most recent call last):",
    '  File "torch/distributed/launcher/api.py", line 300, in launch_agent',
    "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "============================================================",
    "  exitcode  : -9 (pid: 4711)",
]


def test_torchruns_word_of_a_rank_is_no_cause(logs: Logs) -> None:
    """It ends ranks that have not begun yet, and then has words where they have none."""
    logs.node(0, TORCHRUNS_END)
    assert report(logs.folder, 2)[1] == f"    {TORCHRUNS_END[0]}"
    logs.rank(1, [])
    error = first_error(logs.folder, 2)
    assert error is not None and error.rank == 1 and error.how.startswith("left no ending")
    logs.node(1, ["Traceback (most recent call last):", "OSError: [Errno 28] No space left", *TORCHRUNS_END])
    error = first_error(logs.folder, 2)
    assert error is not None and error.host == "node-001"
    assert error.lines[1] == "OSError: [Errno 28] No space left"


def test_a_rank_without_a_log(logs: Logs) -> None:
    logs.rank(0, [], 0)
    lines = report(logs.folder, 2)
    assert lines[0].startswith("first error: rank 1 on an unknown host had written nothing at ")
    logs.rank(0, GLOO, 1)
    error = first_error(logs.folder, 2)
    assert error is not None and error.rank == 0


def test_of_a_long_traceback_the_first_and_last_lines(logs: Logs) -> None:
    logs.rank(0, [OWN[0], *(f'  File "{number}.py"' for number in range(3000)), OWN[-1]], 1)
    error = first_error(logs.folder)
    assert error is not None
    assert len(error.lines) <= 16
    assert error.lines[-1] == OWN[-1]


def test_a_live_line_shows_its_last_state(logs: Logs) -> None:
    logs.rank(0, ["step 1/12\rstep 2/12\rstep 3/12"], 139)
    error = first_error(logs.folder)
    assert error is not None and error.lines[-1] == "step 3/12"


def test_files_that_are_cut_empty_strange_or_gone(logs: Logs) -> None:
    logs.rank(0, OWN, 1, after=3)
    rank_log(logs.folder, 1).write_bytes(b"rank 1 on n1 sta")
    rank_log(logs.folder, 2).write_bytes(b"")
    rank_log(logs.folder, 3).write_bytes(os.urandom(100_000))
    rank_log(logs.folder, 4).symlink_to(logs.folder / "nowhere")
    rank_log(logs.folder, 5).write_text("rank 5 on n3 ended with status 1 at 2027-01-15T08:0")
    (logs.folder / "rank-notes.log").write_text("mine")
    (logs.folder / "node-000.log").write_bytes(b"\xff\xfe")
    error = first_error(logs.folder)
    assert error is not None and error.rank == 0
    report(logs.folder)


def test_an_empty_folder_and_none(tmp_path: Path) -> None:
    assert report(tmp_path) == [f"no error in the logs of {tmp_path}"]
    with pytest.raises(UserError, match="no such folder of logs"):
        report(tmp_path / "nowhere")


def test_a_thousand_long_logs(logs: Logs) -> None:
    """All of it takes well under the minute that a batch script gives it; the files are sparse and 50 MB each."""
    for rank in range(1000):
        logs.rank(rank, [])
        with rank_log(logs.folder, rank).open("r+b") as file:
            file.seek(50_000_000)
            file.write(("\n" + "\n".join(OWN if rank == 777 else GLOO) + "\n").encode())
            host = f"n{rank // 2 + 1}"
            file.write((format_ending(Ending(rank, host, 1, START + rank % 3)) + "\n").encode())
    before = time.monotonic()
    lines = report(logs.folder)
    assert time.monotonic() - before < 30
    assert lines[0].startswith("first error: rank 777 on n389 ended with status 1")
    assert lines[-2] == "  ranks 0-776, 778-999: ended with status 1, 0 to 2 s later"


def test_the_command(logs: Logs) -> None:
    logs.rank(0, OWN, 1)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mf_train.launch.report", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, env=environment(), cwd=REPOSITORY
        )

    done = run(str(logs.folder), "1", "75")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == report(logs.folder)
    done = run(str(logs.folder / "nowhere"), "1", "75")
    assert done.returncode == 2
    assert done.stderr == f"memoryformer: {logs.folder / 'nowhere'}: no such folder of logs\n"


def test_a_first_rank_that_does_not_answer_is_named_by_another(tmp_path: Path) -> None:
    """Under srun the store is rank 0's: where that is stopped no verdict is reached through it; each rank says it."""
    logs = Logs(tmp_path)
    logs.rank(0, [], after=10)
    said = LOST.replace("has gone", "does not answer and no progress for 60 s")
    logs.rank(1, [said], after=70)
    logs.rank(2, [said], after=70)
    logs.rank(3, [], after=5)
    lines = report(tmp_path)
    assert lines[0].startswith("first error: rank 1 on n1 was ended by its watch over the run")
    assert "rank 0, or torchrun's agent, at n1:10123 does not answer" in lines[1]
