"""A run whose ranks stop, hang or die ends in bounded time with one line that names the rank; a healthy one goes on.

Each world is a few real processes over gloo. Several worlds run at once, since they mostly wait.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mf_train.parallel.agreement import run_on_all
from mf_train.parallel.exchange import Exchange, gather_codes
from mf_train.parallel.groups import start_processes
from mf_train.parallel.processes import Process
from mf_train.parallel.watch import (
    Sign,
    Watch,
    describe_standstill,
    find_silent,
    find_speaker,
    is_broken_connection,
)
from tests.warm import free_port, start_warm

pytestmark = pytest.mark.distributed
HOST = socket.gethostname()
LIMIT = 5.0  # seconds
MOST = 40.0  # until the last process has ended; on a quiet machine it takes 9. The collectives wait for 60
WORLDS_AT_ONCE = 7
STEPS = 5  # after which trouble begins


@dataclass(frozen=True)
class World:
    """What happens to some processes after step 5, and whether their store is another process's, as torchrun's is."""

    trouble: str = ""  # what rank 1 does to itself
    signal: int = 0  # what the test sends to `rank`
    rank: int = 1
    size: int = 3
    agent: bool = False


WORLDS = {
    "stopped": World(signal=signal.SIGSTOP),
    "first stopped": World(signal=signal.SIGSTOP, rank=0),
    "first stopped, agent": World(signal=signal.SIGSTOP, rank=0, agent=True),
    "killed": World(signal=signal.SIGKILL, rank=2, agent=True),
    "first killed": World(signal=signal.SIGKILL, rank=0, size=2),
    "reads": World("reads"),
    "computes": World("computes"),
    "all hang": World("all hang", size=2),
    "device, step": World("device, step"),
    "device, backward": World("device, backward"),
    "device, save": World("device, save"),
    "device, library": World("device, library"),
    "raises": World("raises"),
    "another error": World("another error", size=2),
    "works": World("works"),
    "alone": World("alone", size=1),
    "paused": World(signal=signal.SIGSTOP, size=1, rank=0),
}


def play(world: World, process: Process, folder: Path) -> None:
    """One process of a world; its output goes to a file."""
    output = os.open(folder / f"output-{process.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(world.agent)
    os.environ["TORCH_FR_BUFFER_SIZE"] = "100" if world.trouble == "device, library" else "0"
    start_processes(process, torch.device("cpu"), timeout_seconds=60)
    watch = Watch(process, LIMIT, folder / "stacks")
    wait_until(lambda: process.world_size == 1 or watch.connected)
    try:
        train(world, process.rank, watch, folder)
    except RuntimeError as error:
        watch.explain(error)
        raise
    finally:
        watch.close()
    (folder / f"closed-{process.rank}").write_text(str(time.time()))


def train(world: World, rank: int, watch: Watch, folder: Path) -> None:
    values = torch.ones(4)
    for step in range(1, 200):
        trouble = world.trouble if step > STEPS else ""
        watch.entering(f"reading the batch of step {step}")
        if trouble in ("reads", "alone") and rank == min(1, world.size - 1):
            time.sleep(60)
        if trouble == "raises" and rank == 1:
            raise ValueError("a mistake of rank 1 alone")
        if trouble == "another error":
            raise RuntimeError("out of memory")
        watch.entering(f"training step {step}")
        if trouble == "all hang" or (trouble == "computes" and rank == 1):
            time.sleep(60)
        if trouble.startswith("device, "):
            # as under NCCL, the main thread waits for the device and not in a collective
            work = threading.Thread(target=work_of_a_device, args=(trouble, rank))
            work.start()
            work.join()
        if trouble == "works":
            if rank == 1:  # the others wait in their collective for longer than the limit
                for _ in range(20):
                    time.sleep(2 * LIMIT / 20)
                    watch.still_alive()
            dist.all_reduce(values)
            return
        dist.all_reduce(values)
        if step == STEPS:
            (folder / f"ready-{rank}").touch()
        if step == 40 and world.size == 1:
            return
        time.sleep(0.1)


def work_of_a_device(trouble: str, rank: int) -> None:
    """A part of a step with collectives, in the middle of which rank 1 stops."""

    def stop(*_: object) -> None:
        time.sleep(60 * (rank == 1))

    assert dist.group.WORLD is not None
    exchange, x = Exchange(dist.group.WORLD), torch.ones(2, 3, requires_grad=True)
    with suppress(RuntimeError):  # the first that ends breaks the others' connections
        exchange.all_gather(torch.ones(3))
        if trouble == "device, step":
            stop()
            exchange.all_gather(torch.ones(3))
        if trouble == "device, backward":
            _, y = gather_codes(torch.zeros(2, 3, dtype=torch.uint8), x, exchange)
            y.register_hook(stop)
            y.sum().backward()
        if trouble == "device, save":
            run_on_all(stop, torch.device("cpu"))
        if trouble == "device, library":
            stop()
            dist.all_reduce(x.detach())


@dataclass
class Outcome:
    statuses: list[int | None]
    output: list[str]  # of each rank
    seconds: float  # from the trouble to the end of the last process that was not stopped
    seconds_to_leave: list[float]  # from the end of the watch, where it was closed
    stacks: dict[str, str]

    @property
    def said(self) -> list[str]:
        return [line for text in self.output for line in text.splitlines()]


def own_words(text: str) -> str:
    """A rank's output without what c10d warns of when the store's host ends a moment before this rank does."""
    theirs = re.compile(
        r"\[rank\d+\]:\[W\S+ .*\[c10d\]|Exception raised from |frame #|<omitting python frames>|$"
    )
    return "".join(line for line in text.splitlines(keepends=True) if not theirs.match(line.rstrip("\n")))


def run_world(world: World, folder: Path) -> Outcome:
    folder.mkdir()
    port = free_port()
    agent = (
        dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
        if world.agent
        else None
    )
    processes = []
    for rank in range(world.size):
        process = Process(rank, world.size, rank, "127.0.0.1", port)
        processes.append(start_warm(play, world, process, folder, daemon=True))
    try:
        wait_until(lambda: all((folder / f"ready-{rank}").exists() for rank in range(world.size)))
        started = time.monotonic()
        if world.signal:
            os.kill(processes[world.rank].pid or 0, world.signal)
        if world.signal == signal.SIGSTOP and world.size == 1:
            time.sleep(2 * LIMIT)
            os.kill(processes[0].pid or 0, signal.SIGCONT)
        left = {}
        for rank, child in enumerate(processes):
            if world.signal == signal.SIGSTOP and rank == world.rank and world.size > 1:
                continue
            child.join(60)
            left[rank] = time.time()
        seconds = time.monotonic() - started
        closed = [folder / f"closed-{rank}" for rank in range(world.size)]
        return Outcome(
            [child.exitcode for child in processes],
            [own_words((folder / f"output-{rank}").read_text()) for rank in range(world.size)],
            seconds,
            [left[rank] - float(path.read_text()) for rank, path in enumerate(closed) if path.exists()],
            {path.name: path.read_text(errors="replace") for path in (folder / "stacks").glob("*")},
        )
    finally:
        for child in processes:
            child.kill()
            child.join()
        del agent


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Outcome]]]:
    folder = tmp_path_factory.mktemp("worlds")
    with ThreadPoolExecutor(WORLDS_AT_ONCE) as pool:
        yield {name: pool.submit(run_world, world, folder / name) for name, world in WORLDS.items()}


PLACE, SECONDS = r"(reading the batch of|training) step \d+", r"no progress for \d+ s"
LATE = f"{SECONDS}: rank 1 on {HOST} has been training step 6 for \\d+ s"
NO_PROGRESS = {
    "stopped": f"{SECONDS}: rank 1 on {HOST} does not answer, last seen \\d+ s ago, {PLACE}",
    "first stopped": r"rank 0, or torchrun's agent, at 127\.0\.0\.1:\d+ does not answer and no progress for \d+ s; "
    rf"rank 1 on {HOST} was training step \d+",
    "first stopped, agent": f"{SECONDS}: rank 0 on {HOST} does not answer, last seen \\d+ s ago, {PLACE}",
    "reads": f"{SECONDS}: rank 1 on {HOST} has been reading the batch of step 6 for \\d+ s; "
    "the others are training step 6",
    "computes": f"{SECONDS}: rank 1 on {HOST} has been training step 6 for \\d+ s, in no collective; "
    "the others wait in one",
    "all hang": f"{SECONDS}: all 2 ranks have been training step 6",
    "alone": f"{SECONDS}: reading the batch of step 6",
    "device, step": f"{LATE}, has started collective 1 \\(tensor-parallel all-gather\\), "
    "others collective 2 \\(tensor-parallel all-gather\\)",
    "device, backward": f"{LATE}, has started collective 2 \\(tensor-parallel all-gather\\), "
    "others collective 3 \\(tensor-parallel all-to-all\\)",
    "device, save": f"{LATE}, has started collective 1 \\(tensor-parallel all-gather\\), "
    "others collective 2 \\(agreement of all ranks\\)",
    "device, library": f"{LATE}, has called 6 collectives in all, others 7",
}
KILLED = {
    "killed": f"rank 2 on {HOST} does not answer, last seen \\d s ago, {PLACE}",
    "first killed": r"rank 0, or torchrun's agent, at 127\.0\.0\.1:\d+ has gone; "
    rf"rank 1 on {HOST} was training step \d+",
}


@pytest.mark.parametrize("name", NO_PROGRESS)
def test_no_progress_ends_all_with_one_line(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome, world, line = outcomes[name].result(), WORLDS[name], NO_PROGRESS[name]
    said = [text for text in outcome.said if text.startswith("memoryformer: ")]
    assert len(said) == 1 and said == outcome.said
    assert re.fullmatch(
        rf"memoryformer: {line}; run the same command again to resume \(stacks: .*\)", said[0]
    ), said
    stopped = world.rank if world.signal else None
    speaker = 1 if stopped == 0 else 0
    assert said == outcome.output[speaker].splitlines()
    answering = [rank for rank in range(world.size) if rank != stopped]
    assert [outcome.statuses[rank] for rank in answering] == [1] * len(answering)
    assert LIMIT - 1 < outcome.seconds < MOST
    recordings = [f"collectives-{rank}" for rank in answering] if name == "device, library" else []
    assert sorted(outcome.stacks) == recordings + [f"rank-{rank}.txt" for rank in answering]
    assert all("all_reduce" in outcome.stacks[recording] for recording in recordings)
    for rank in answering:
        assert "in train" in outcome.stacks[f"rank-{rank}.txt"]


@pytest.mark.parametrize("name", KILLED)
def test_a_killed_rank_is_named_without_a_traceback(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome, world, line = outcomes[name].result(), WORLDS[name], KILLED[name]
    expected = [-signal.SIGKILL if rank == world.rank else 1 for rank in range(world.size)]
    assert outcome.statuses == expected
    assert len(outcome.said) == 1
    assert re.fullmatch(f"memoryformer: {line}; run the same command again to resume", outcome.said[0]), (
        outcome.said
    )
    assert outcome.seconds < MOST and not outcome.stacks


def test_a_rank_that_raised_is_named_besides_its_own_traceback(outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes["raises"].result()
    assert outcome.statuses == [1, 1, 1] and outcome.seconds < MOST
    assert outcome.output[1].splitlines()[-1] == "ValueError: a mistake of rank 1 alone"
    line = (
        f"memoryformer: rank 1 on {HOST} has ended, last seen \\d s ago, reading the batch of step 6; run .*"
    )
    assert re.fullmatch(line + "\n", outcome.output[0]) and not outcome.output[2]


def test_another_error_is_left_alone(outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes["another error"].result()
    assert outcome.statuses == [1, 1]
    for output in outcome.output:
        assert output.splitlines()[-1] == "RuntimeError: out of memory"


def test_work_that_beats_goes_on_beyond_the_limit(outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes["works"].result()
    assert outcome.statuses == [0, 0, 0] and not outcome.said
    assert outcome.seconds > 2 * LIMIT and not outcome.stacks


def test_time_in_which_the_process_is_stopped_does_not_count(outcomes: dict[str, Future[Outcome]]) -> None:
    outcome = outcomes["paused"].result()
    assert outcome.statuses == [0] and not outcome.said


@pytest.mark.parametrize("name", ["works", "paused"])
def test_a_finished_process_ends_at_once(outcomes: dict[str, Future[Outcome]], name: str) -> None:
    outcome = outcomes[name].result()
    assert len(outcome.seconds_to_leave) == WORLDS[name].size and max(outcome.seconds_to_leave) < LIMIT


# the judgement by itself


def signs(ages: list[float], orders: list[int] | None = None) -> list[Sign | None]:
    """The second reading's sign of each rank, posted just now."""
    orders = orders or [7] * len(ages)
    return [
        Sign(9, f"n{rank}", time.time(), order, f"at place {order}", age, True)
        for rank, (age, order) in enumerate(zip(ages, orders, strict=True))
    ]


def changed(signs: list[Sign | None], rank: int, **values: object) -> list[Sign | None]:
    sign = signs[rank]
    assert sign is not None
    return [*signs[:rank], replace(sign, **values), *signs[rank + 1 :]]  # type: ignore[arg-type]


def test_silent_ranks_are_those_whose_number_stays() -> None:
    before = signs([60.0] * 4)
    after = changed(changed(before, 0, number=10), 2, number=10, left=True)
    assert find_silent(before, after) == {1, 2, 3}
    assert find_silent([*before[:3], None], [*after[:3], before[3]]) == {1, 2}
    assert find_silent(before, [*after[:3], None]) == {1, 2, 3}
    assert find_speaker({0, 1}, after) == 2


def test_a_rank_that_moves_keeps_the_run_alive() -> None:
    assert describe_standstill(set(), signs([60.0, 60.0]), 60.0, 1.0)
    assert describe_standstill(set(), signs([60.0, 59.0]), 60.0, 1.0) == ""


def test_the_silence_of_a_rank_counts_by_its_clock_and_by_what_was_seen() -> None:
    since = time.time()
    silent = {1}
    assert describe_standstill(silent, changed(signs([60.0, 0.0]), 1, time=since - 58), 60.0, 1.0) == ""
    late = changed(signs([60.0, 0.0]), 1, time=since - 61)
    assert re.fullmatch(
        "rank 1 on n1 does not answer, last seen 61 s ago, at place 7",
        describe_standstill(silent, late, 60.0, 1.0),
    )
    ahead = changed(signs([60.0, 0.0]), 1, time=since + 3600)  # its clock is wrong
    assert describe_standstill(silent, ahead, 60.0, 1.0) == ""
    assert "last seen 0 s ago" in describe_standstill(silent, ahead, 60.0, 61.0)


def test_a_rank_that_ended_or_was_never_seen_does_not_keep_the_run_alive() -> None:
    ended = changed(signs([60.0, 0.0]), 1, left=True)
    assert describe_standstill({1}, ended, 60.0, 1.0).startswith("rank 1 on n1 has ended")
    unseen = [*signs([60.0]), None]
    assert describe_standstill({1}, unseen, 60.0, 1.0) == "rank 1 has given no sign of life since the start"


def test_many_ranks_make_a_short_line() -> None:
    many = signs([60.0] * 1000, [6] * 999 + [7])
    line = describe_standstill(set(), many, 60.0, 1.0)
    assert line.startswith("rank 0 on n0 has been at place 6 for 60 s; rank 1 on n1 ")
    assert line.endswith("; and 995 more in such places; the others are at place 7") and "rank 4 " not in line


def progressed(signs: list[Sign | None], started: list[int], finished: list[int]) -> list[Sign | None]:
    for rank, (first, second) in enumerate(zip(started, finished, strict=True)):
        names = {"started_name": f"c{first}", "finished_name": f"c{second}"}
        signs = changed(signs, rank, started=first, finished=second, **names)
    return signs


def describe(signs: list[Sign | None]) -> str:
    return describe_standstill(set(), signs, 60.0, 1.0)


def test_the_rank_that_has_come_less_far_in_the_collectives_is_named() -> None:
    many = signs([60.0] * 4)
    # rank 2 waits for rank 3, the others for both
    assert describe(progressed(many, [9, 9, 8, 7], [8, 8, 7, 7])) == (
        "rank 3 on n3 has been at place 7 for 60 s, has started collective 7 (c7), others collective 9 (c9)"
    )
    assert describe(progressed(many, [9] * 4, [9, 9, 8, 9])) == (
        "rank 2 on n2 has been at place 7 for 60 s, has finished collective 8 (c8), others collective 9 (c9)"
    )
    assert (
        describe(progressed(many, [9] * 4, [8] * 4))
        == "all 4 ranks have been at place 7, in collective 9 (c9)"
    )
    assert describe(progressed(many, [0, 1, 1, 1], [0] * 4)).endswith(
        "has started no collective, others collective 1 (c1)"
    )


def test_a_place_tells_more_than_collectives_which_tell_ranks_at_one_place_apart() -> None:
    behind = progressed(signs([60.0] * 4, [7, 7, 6, 6]), [9, 9, 9, 8], [8, 8, 8, 8])
    assert describe(behind) == (
        "rank 3 on n3 has been at place 6 for 60 s, has started collective 8 (c8), others collective 9 (c9); "
        "the others are at place 7"
    )


def test_what_torch_recorded_tells_where_nothing_else_does() -> None:
    waiting = signs([60.0] * 3)
    for rank in range(3):
        waiting = changed(waiting, rank, waits=False, called=20, complete=19)
    assert describe(waiting) == "all 3 ranks have been at place 7"
    assert describe(changed(waiting, 1, called=18)).endswith("has called 18 collectives in all, others 20")
    assert describe(changed(waiting, 1, complete=18)).endswith(
        "has 18 collectives complete in all, others 19"
    )
    # the main thread of others is in a collective, as it is with gloo
    of_gloo = changed(changed(waiting, 0, waits=True), 2, waits=True, called=21)
    assert describe(of_gloo).endswith("in no collective; the others wait in one")


def test_what_counts_as_a_broken_connection() -> None:
    assert is_broken_connection(
        RuntimeError("[/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    )
    assert is_broken_connection(dist.DistBackendError("NCCL error"))
    assert not is_broken_connection(RuntimeError("out of memory"))
    assert not is_broken_connection(OSError("gloo/transport"))
