"""Stopping before a job's time limit: how early, the warning, a real run that does it; and at a terminal's signals."""

from __future__ import annotations

import fcntl
import math
import os
import pty
import re
import signal
import subprocess
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mf_train.checkpoint.layout import resolve_checkpoint
from mf_train.checkpoint.read import CheckpointReader
from mf_train.training.stopping import Deadline, find_deadline
from tests.training.runs import (
    REPOSITORY,
    command_line,
    environment,
    has_steps,
    read_metrics,
    small_config,
    start,
    wait_for,
    write_config,
    write_text,
)


def test_time_for_the_saves_a_step_and_a_reserve_is_kept() -> None:
    deadline = Deadline(math.inf, notice=120, saves=1)
    assert deadline.needed(0) == 10
    deadline.note_step(50)  # the first step compiles
    assert deadline.needed(0) == 10
    deadline.note_step(4)
    deadline.note_step(2)  # the longest counts
    assert deadline.needed(80) == pytest.approx(10 + 1.25 * (80 + 2 * 4))
    assert Deadline(math.inf, 120, saves=2).needed(80) == pytest.approx(10 + 1.25 * 160)
    for _ in range(1000):
        deadline.note_step(1)  # validations are rare
    assert deadline.needed(80) == pytest.approx(10 + 1.25 * (80 + 2 * 4))


def test_warns_once_where_the_notice_is_too_short() -> None:
    deadline = Deadline(time.time() + 3600, notice=60, saves=1)
    assert deadline.warning(save_seconds=39) is None
    warning = deadline.warning(save_seconds=80)
    assert warning is not None and "a save takes 80 s" in warning and "the notice of 60 s" in warning
    assert "stops 110 s before" in warning and "--notice 120" in warning
    assert deadline.warning(save_seconds=80) is None
    assert Deadline(math.inf, notice=60, saves=1).warning(save_seconds=80) is None  # no limit


def test_passes_as_early_as_a_save_needs() -> None:
    now = time.time()
    assert not Deadline(now + 200, notice=60, saves=1).passed(80)
    assert Deadline(now + 100, notice=60, saves=1).passed(80)
    assert not Deadline(now + 100, notice=60, saves=1).passed(40)
    assert not Deadline(math.inf, notice=60, saves=1).passed(1e6)


def test_reads_the_job_s_limit() -> None:
    deadline = find_deadline({"SLURM_JOB_END_TIME": "1700000000", "MF_NOTICE_SECONDS": "90"}, saves=2)
    assert (deadline.end, deadline.notice, deadline.saves) == (1.7e9, 90, 2)
    for outside in ({}, {"SLURM_JOB_END_TIME": "Unknown"}, {"SLURM_JOB_END_TIME": "0"}):
        assert find_deadline(outside, saves=1).end == math.inf


def test_a_run_stops_by_itself_before_the_limit(tmp_path: Path) -> None:
    """No signal comes; the notice is shorter than what a save needs."""
    tree = long_run(tmp_path)
    for seconds in (25, 100):  # a busy machine may not have begun to train when the first is over
        limit = time.time() + seconds
        run = start(tree, SLURM_JOB_END_TIME=f"{limit:.0f}", MF_NOTICE_SECONDS="5")
        output, errors = run.communicate(timeout=120)
        ended = time.time()
        assert run.returncode == 75, output + errors
        if metrics := read_metrics(tmp_path / "run"):
            break
    assert ended < limit
    assert len(re.findall("the notice of 5 s is too short", output)) == 1
    last = metrics[-1]["step"]
    assert f"stopped on request after step {last};" in output
    assert (tmp_path / "run/checkpoints/latest").read_text().strip() == f"step-{last:09d}"


def long_run(folder: Path) -> dict[str, Any]:
    tree = small_config(folder / "run", write_text(folder / "text.jsonl"))
    tree["training"]["steps"] = 100_000
    return tree


def in_a_terminal(tree: dict[str, Any], processes: int = 1) -> tuple[subprocess.Popen[bytes], int]:
    """A run in a terminal of its own, and the terminal's other end."""
    here, there = pty.openpty()
    process = subprocess.Popen(
        command_line(["train", write_config(tree)], processes),
        stdin=there,
        stdout=there,
        stderr=there,
        env=environment(),
        cwd=REPOSITORY,
        start_new_session=True,
        preexec_fn=lambda: (
            signal.signal(signal.SIGINT, signal.default_int_handler),
            signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
            fcntl.ioctl(there, termios.TIOCSCTTY, 0),
        ),
    )
    os.close(there)
    return process, here


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """SIGHUP to the trainer and its workers; what is printed from then on goes nowhere."""
    tree = long_run(tmp_path)
    process, terminal = in_a_terminal(tree)
    wait_for(lambda: has_steps(tree, 3))
    os.close(terminal)
    assert process.wait(timeout=60) == 75
    stopped = len(read_metrics(tmp_path / "run"))
    assert CheckpointReader(resolve_checkpoint(tmp_path / "run")).manifest.step == stopped


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_in_a_terminal_saves(processes: int, tmp_path: Path) -> None:
    """torchrun takes it for its ranks, and has a status of its own."""
    tree = long_run(tmp_path)
    process, terminal = in_a_terminal(tree, processes)
    wait_for(lambda: has_steps(tree, 3))
    os.write(terminal, b"\x03")
    assert process.wait(timeout=60) == (75 if processes == 1 else 1)
    said = ""
    with suppress(OSError):  # the end, where nobody has the terminal open any more
        while piece := os.read(terminal, 1 << 20):
            said += piece.decode()
    assert said.count("Ctrl-C again ends at once") == 1
    assert f"stopped on request after step {len(read_metrics(tmp_path / 'run'))};" in said
    os.close(terminal)


def test_ctrl_c_saves_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    """On two ranks. What the first asked for is not there, or complete, when the second comes at once."""
    tree = long_run(tmp_path)
    run = start(tree, processes=2)
    wait_for(lambda: has_steps(tree, 3))
    run.send_signal(signal.SIGINT)
    output, errors = run.communicate(timeout=60)
    assert [rank.exitcode for rank in run.ranks] == [75, 75], output
    stopped = len(read_metrics(tmp_path / "run"))
    assert f"stopped on request after step {stopped};" in output
    assert errors.count("Ctrl-C again ends at once") == 1
    run = start(tree, processes=2)
    wait_for(lambda: has_steps(tree, stopped + 3))
    run.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again" in run.said()[1], every=0.001)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    first, second = (rank.exitcode for rank in run.ranks)
    assert first in (75, -signal.SIGINT)
    assert second in (75, -signal.SIGINT, 1)  # 1: it waited for the first, and found it gone
    assert CheckpointReader(resolve_checkpoint(tmp_path / "run")).manifest.step >= stopped
