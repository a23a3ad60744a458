"""Watching over a run: a rank that stops answering ends it in bounded time, with one line that names the rank.

The main thread of each process says where it goes (`Watch.entering`). Two more threads do the rest. One talks to the
c10d store through a connection of its own: every period it posts the rank's sign of life and looks whether a verdict
has been reached. The other never waits for anything; it measures how long the main thread has stood still, and ends the
process when there is a verdict. Only in trouble does one rank read the signs of all. Where every rank has stood still
for the limit, those whose signs have stopped coming are to blame (stopped, dead, their node gone), else those that
stand at an earlier place than the others. Of these, or of all, it is those that have started, or finished, fewer
collectives than others (`parallel.collectives`), else those whose main thread is in no collective while others are.
Under NCCL none is: there the main thread waits for the device, and torch's own count tells of collectives that a
library starts.

At W ranks the store serves W / period small sets and as many checks a second; from a limit of 24 s on the period is
2 s, so 1 000 ranks make 500 of each, where one core served 75 000 pairs. In trouble one reader takes all W signs twice.

A thread that waits in a C++ collective or in a read of a file holds no interpreter lock: the watch continues beside it.
One that hangs while it holds the lock silences its own watch too. The other ranks then find that it does not answer,
and the launcher ends it; in a run of one process nothing does.
"""

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from mf_train.exit_status import FAILED
from mf_train.parallel.collectives import ledger, recorded, recording
from mf_train.parallel.processes import Process

_LONGEST_PERIOD = 2.0
_PERIODS_IN_LIMIT = 12
_PERIODS_OF_SILENCE = 3  # in which an answering rank has posted at least twice
_PERIODS_OF_PATIENCE = 6  # until another rank that wanted to look around counts as lost
_NAMED_RANKS = 4  # in a message
_KEY = "mf_train/watch/"
RECORDINGS = "collectives-"  # and the rank: torch's flight recorder's dumps in the folder of stacks


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life."""

    number: int  # one more each time
    host: str
    time: float  # of the rank's clock: for the message, and to judge a rank that is silent
    order: int  # how many places the main thread has been at
    place: str
    age: float  # seconds in which the main thread has not moved
    waits: bool  # the main thread is inside a collective
    left: bool = False  # the rank's last sign: it ended
    # Collectives, as parallel.collectives has them; what torch records is looked at in trouble alone.
    started: int = 0
    started_name: str = ""
    finished: int = 0
    finished_name: str = ""
    called: int = 0
    complete: int = 0


class Verdict(NamedTuple):
    """Why the run ends, and the rank that says so."""

    speaker: int
    text: str


class Watch:
    """Ends this process, with status 1, when the run makes no progress for `limit_seconds`; one rank says why.

    Made by the main thread, on every rank, after the process group, whose store (at the process's master address) it
    uses. From the moment when the last rank stood still, the end comes after the limit and at most 12 periods, a period
    being 2 s or a twelfth of the limit. A rank that moves, by `entering` or `still_alive`, is at work, and those that
    wait for it wait on: their collectives have a timeout of their own. Time in which a process was itself stopped
    (Ctrl-Z) or starved does not count. With `stacks`, each process leaves its threads' stacks in `rank-N.txt` in that
    folder when the run ends for want of progress, and the flight recorder's dump in `collectives-N`, where it is on.
    """

    def __init__(self, process: Process, limit_seconds: float, stacks: Path | None = None) -> None:
        self.process = process
        self.limit = limit_seconds
        self.stacks = stacks
        self.period = min(_LONGEST_PERIOD, limit_seconds / _PERIODS_IN_LIMIT)
        self._alone = process.world_size == 1
        self._host = socket.gethostname()
        self._main_thread = threading.get_ident()
        self._stand = (0, "starting")
        self._moves = 0
        self._age = 0.0
        self._signs = 0
        # When the store last did. The first time may be late: its server looks up the name of each host that connects,
        # one after another, and waits 5 s and more where no name server answers.
        self._answered = math.inf
        self._store_lost = False
        self._explaining = False  # `explain` wants to know who is gone
        self._nobody_gone = False
        self._patience = _PERIODS_OF_PATIENCE
        self._verdict: Verdict | None = None
        self._closing = threading.Event()
        targets = [self._keep_time] if self._alone else [self._keep_time, self._talk]
        self._threads = [threading.Thread(target=target, name="watch", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    # for the main thread

    def entering(self, place: str) -> None:
        """Say what the main thread does next, as in "reading the batch of step 18".

        All ranks call this with the same places in the same order, even where a rank has nothing to do. The number of
        calls then shows which rank is behind.
        """
        self._stand = (self._stand[0] + 1, place)

    def still_alive(self) -> None:
        """Say that work at this place advances: work that the main thread does, or that it waits for."""
        self._moves += 1

    @property
    def connected(self) -> bool:
        """Whether the store has answered at least once; before, only a run of one process is watched."""
        return self._answered < math.inf

    def explain(self, error: Exception) -> None:
        """Where a connection to another rank broke: find out whose process is gone, let one rank say it, and end.

        Ends this process with status 1, in about 6 periods. Returns where the error is of another kind or no rank
        is gone; the caller then raises the error.
        """
        if self._alone or not is_broken_connection(error):
            return
        self._explaining = True
        deadline = time.monotonic() + (_PERIODS_OF_PATIENCE + 2 * _PERIODS_OF_SILENCE) * self.period
        while self._verdict is None and not self._nobody_gone and time.monotonic() < deadline:
            time.sleep(self.period / 4)
        self._wait_for_end()

    def close(self) -> None:
        """Stop watching; the others learn that this rank has ended. Once a verdict is there, the process still ends."""
        self._closing.set()
        for thread in self._threads:
            thread.join(self.period)
        self._wait_for_end()

    def _wait_for_end(self) -> None:
        """Never returns once there is a verdict: the thread that keeps the time ends the process."""
        while self._verdict is not None:
            time.sleep(self.period)

    # the thread that never waits for anything

    def _keep_time(self) -> None:
        seen: tuple[int, int] | None = None
        before = time.monotonic()
        while not self._closing.wait(self.period) or self._verdict is not None:
            now = time.monotonic()
            moved = (self._stand[0], self._moves)
            self._age = self._age + min(now - before, 2 * self.period) if moved == seen else 0.0
            seen, before = moved, now
            if self._verdict is None and (self._explaining or self._age >= self.limit):
                self._judge_alone(now)
            if self._verdict is not None:
                self._end(self._verdict)

    def _judge_alone(self, now: float) -> None:
        """A verdict without the others: where there are none, or where the store does not answer."""
        place, stacks = self._stand[1], self._hint()
        if self._alone:
            self._verdict = Verdict(0, f"no progress for {self._age:.0f} s: {place}; {stacks}")
        elif self._store_lost or now - self._answered > self._store_patience():
            process = self.process
            # one line for each node at most: rank 1 is on rank 0's
            speaks = process.local_rank == 0 or process.rank == 1
            trouble = "has gone" if self._store_lost else "does not answer"
            stood = "" if self._explaining else f" and no progress for {self._age:.0f} s"
            self._verdict = Verdict(
                process.rank if speaks else -1,
                f"rank 0, or torchrun's agent, at {process.master_address}:{process.master_port} {trouble}{stood}; "
                f"rank {process.rank} on {self._host} was {place}; {stacks}",
            )

    def _store_patience(self) -> float:
        """Seconds without an answer after which the store counts as gone; it may be slow where machines are busy."""
        return 2 * _PERIODS_OF_SILENCE * self.period if self._explaining else self.limit / 2

    def _hint(self) -> str:
        stacks = f" (stacks: {self.stacks})" if self.stacks is not None and not self._explaining else ""
        return f"run the same command again to resume{stacks}"

    def _end(self, verdict: Verdict) -> None:
        if verdict.speaker == self.process.rank:
            above = "\n" * os.isatty(1)  # the line of the last step is open on a terminal
            line = f"{above}memoryformer: {verdict.text}\n".encode()
            self._briefly(lambda: os.write(2, line))  # past sys.stderr, whose lock a hanging print would hold
        if self.stacks is not None and not self._explaining:
            self._briefly(self._write_stacks)
        if not self._alone:
            # all see the verdict before any connection breaks
            time.sleep(_PERIODS_OF_SILENCE * self.period)
        os._exit(FAILED)

    def _briefly(self, action: Callable[[], object]) -> None:
        """Run an action that may hang or fail, as what it writes to may be what hangs."""

        def act() -> None:
            with suppress(OSError):
                action()

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        thread.join(self.period)

    def _write_stacks(self) -> None:
        assert self.stacks is not None
        self.stacks.mkdir(parents=True, exist_ok=True)
        with (self.stacks / f"rank-{self.process.rank}.txt").open("w", encoding="utf-8") as file:
            file.write(f"rank {self.process.rank} on {self._host}, {self._stand[1]} for {self._age:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file)
        if dump := recording():
            (self.stacks / f"{RECORDINGS}{self.process.rank}").write_bytes(dump)

    # the thread that talks to the store; a call may wait for ever: get, past its timeout, where the server is stopped

    def _talk(self) -> None:
        address = (self.process.master_address, self.process.master_port)
        try:
            with socket.create_connection(address) as line:
                line.setblocking(False)
                timeout = timedelta(seconds=max(60.0, self.limit))
                store = dist.TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
                while not self._closing.is_set():
                    _check_open(line)
                    self._exchange(store)
                    if self._verdict is None and (self._explaining or self._age >= self.limit):
                        self._look_around(store)
                    self._closing.wait(self.period)
                _check_open(line)
                self._post(store, left=True)
        except (RuntimeError, OSError):
            self._store_lost = True

    def _exchange(self, store: dist.Store) -> None:
        self._post(store)
        if store.check([_KEY + "verdict"]):
            self._verdict = self._verdict or Verdict(*json.loads(store.get(_KEY + "verdict")))
        self._answered = time.monotonic()

    def _post(self, store: dist.Store, left: bool = False) -> None:
        self._signs += 1
        order, place = self._stand
        waits = self._age > 0 and _is_in_collective(self._main_thread)
        sign = Sign(self._signs, self._host, time.time(), order, place, self._age, waits, left)
        started, finished = ledger.last()
        sign = replace(sign, started=started.number, started_name=started.name)
        sign = replace(sign, finished=finished.number, finished_name=finished.name)
        if self._age >= self.limit / 2:
            totals = recorded()
            sign = replace(sign, called=totals.called, complete=totals.complete)
        store.set(f"{_KEY}{self.process.rank}", json.dumps(asdict(sign)))

    def _look_around(self, store: dist.Store) -> None:
        """Read all signs twice and pass the verdict, if there is one; only one rank at a time does that."""
        me = str(self.process.rank)
        looking = store.compare_set(_KEY + "looks", "", me).decode()
        if looking != me and self._patience > 0:
            self._patience -= 1
            return
        explaining, before = self._explaining, self._read_all(store)
        for _ in range(_PERIODS_OF_SILENCE):
            if self._closing.wait(self.period):
                return
            self._exchange(store)
        waited = _PERIODS_OF_SILENCE * self.period
        after = self._read_all(store)
        silent = find_silent(before, after)
        if explaining:
            trouble = describe_silent(silent, after)
        else:
            trouble = describe_standstill(silent, after, self.limit - 2 * self.period, waited)
        if trouble:
            stood = "" if explaining else f"no progress for {self._age:.0f} s: "
            verdict = Verdict(find_speaker(silent, after), f"{stood}{trouble}; {self._hint()}")
            told = store.compare_set(_KEY + "verdict", "", json.dumps(verdict))
            self._verdict = Verdict(*json.loads(told))
        else:
            store.delete_key(_KEY + "looks")
            self._nobody_gone = explaining
        self._patience = _PERIODS_OF_PATIENCE

    def _read_all(self, store: dist.Store) -> list[Sign | None]:
        keys = [f"{_KEY}{rank}" for rank in range(self.process.world_size)]
        found = keys if store.check(keys) else [key for key in keys if store.check([key])]
        signs = {
            key: Sign(**json.loads(text)) for key, text in zip(found, store.multi_get(found), strict=True)
        }
        return [signs.get(key) for key in keys]


def is_broken_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank went away or was late, as torch.distributed and gloo put it."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def find_silent(before: Sequence[Sign | None], after: Sequence[Sign | None]) -> set[int]:
    """Ranks that gave no sign of life between two readings, or ended, or were never seen."""
    return {
        rank
        for rank, (first, second) in enumerate(zip(before, after, strict=True))
        if second is None or second.left or (first is not None and first.number == second.number)
    }


def find_speaker(silent: set[int], signs: Sequence[Sign | None]) -> int:
    """The lowest answering rank: rank 0's output is the one that launchers show."""
    return min(rank for rank in range(len(signs)) if rank not in silent)


def describe_silent(silent: set[int], signs: Sequence[Sign | None]) -> str:
    """Which ranks do not answer and where they were last seen; empty if all do."""
    return _join([_describe_silent(rank, signs[rank]) for rank in sorted(silent)], "that do not answer")


def describe_standstill(
    silent: set[int], signs: Sequence[Sign | None], limit_seconds: float, waited: float
) -> str:
    """Who keeps the run from going on; empty if a rank has moved within the limit, as far as can be known.

    A silent rank has stood still for as long as its last sign says and its silence lasted since: by the clocks, and
    at least the seconds `waited` between the two readings.
    """
    now = time.time()
    for rank, sign in enumerate(signs):
        if sign is not None and not sign.left:
            silence = max(waited, now - sign.time) if rank in silent else 0.0
            if sign.age + silence < limit_seconds:
                return ""
    if silent:
        return describe_silent(silent, signs)
    answering = [(rank, sign) for rank, sign in enumerate(signs) if sign is not None]
    first = min(sign.order for _, sign in answering)
    last = max((sign for _, sign in answering), key=lambda sign: sign.order)
    behind = [(rank, sign) for rank, sign in answering if sign.order == first]
    others = f"; the others are {last.place}"
    among_behind = others * (first < last.order)
    idle = [(rank, sign) for rank, sign in behind if not sign.waits]
    if lag := _find_lag(behind, _OUR_COLLECTIVES):
        behind, others = lag[0], f", {lag[1]}{among_behind}"
    elif first == last.order and 0 < len(idle) < len(behind):
        behind, others = idle, ", in no collective; the others wait in one"
    elif lag := _find_lag(behind, _ALL_COLLECTIVES):
        behind, others = lag[0], f", {lag[1]}{among_behind}"
    if len(behind) == len(answering):
        return f"all {len(answering)} ranks have been {last.place}" + _describe_waiting(last)
    return _join([_describe_standing(rank, sign) for rank, sign in behind], "in such places") + others


# How far a rank has come, and how that is said of one that has not come as far as another.
_Measure = tuple[Callable[[Sign], int], Callable[[Sign, Sign], str]]
_OUR_COLLECTIVES: list[_Measure] = [
    (
        lambda sign: sign.started,
        lambda slow, fast: (
            f"has started {_describe_mark(slow.started, slow.started_name)}, "
            f"others {_describe_mark(fast.started, fast.started_name)}"
        ),
    ),
    (
        lambda sign: sign.finished,
        lambda slow, fast: (
            f"has finished {_describe_mark(slow.finished, slow.finished_name)}, "
            f"others {_describe_mark(fast.finished, fast.finished_name)}"
        ),
    ),
]
_ALL_COLLECTIVES: list[_Measure] = [
    (
        lambda sign: sign.called,
        lambda slow, fast: f"has called {slow.called} collectives in all, others {fast.called}",
    ),
    (
        lambda sign: sign.complete,
        lambda slow, fast: f"has {slow.complete} collectives complete in all, others {fast.complete}",
    ),
]


def _find_lag(
    ranks: Sequence[tuple[int, Sign]], measures: Sequence[_Measure]
) -> tuple[list[tuple[int, Sign]], str] | None:
    """Those that have come less far than others by the first measure that differs, and how far; or None."""
    for measure, describe in measures:
        slow, fast = (find((sign for _, sign in ranks), key=measure) for find in (min, max))
        if measure(slow) < measure(fast):
            return [item for item in ranks if measure(item[1]) == measure(slow)], describe(slow, fast)
    return None


def _describe_mark(number: int, name: str) -> str:
    return f"collective {number} ({name})" if number else "no collective"


def _describe_waiting(sign: Sign) -> str:
    if sign.started > sign.finished:
        return f", in {_describe_mark(sign.started, sign.started_name)}"
    return ", in collectives" * sign.waits


def _describe_silent(rank: int, sign: Sign | None) -> str:
    if sign is None:
        return f"rank {rank} has given no sign of life since the start"
    verb = "has ended" if sign.left else "does not answer"
    ago = max(0.0, time.time() - sign.time)
    return f"rank {rank} on {sign.host} {verb}, last seen {ago:.0f} s ago, {sign.place}"


def _describe_standing(rank: int, sign: Sign) -> str:
    return f"rank {rank} on {sign.host} has been {sign.place} for {sign.age:.0f} s"


def _join(descriptions: Sequence[str], rest: str) -> str:
    more = len(descriptions) - _NAMED_RANKS
    return "; ".join([*descriptions[:_NAMED_RANKS], *([f"and {more} more {rest}"] if more > 0 else [])])


def _is_in_collective(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    return frame is not None and frame.f_globals.get("__name__", "").startswith("torch.distributed")


def _check_open(line: socket.socket) -> None:
    """Raise where the store's process is gone; the store itself would fill the terminal with a C++ stack."""
    try:
        if line.recv(1) == b"":
            raise ConnectionError
    except BlockingIOError:  # nothing to read: all is well
        pass
