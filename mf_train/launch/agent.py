"""The ranks of one node: `srun --ntasks-per-node=1 python -m mf_train.launch.agent LOGS PER_NODE -- train CONFIG ...`.

torchrun's own agent (torch.distributed.elastic, static rendezvous at MASTER_ADDR:MASTER_PORT, node rank SLURM_NODEID of
SLURM_STEP_NUM_NODES) starts and numbers the ranks and holds the store they meet at. What differs from torchrun: it
ends with the status of the ranks, equal on all nodes (75 where all that did not end with 0 saved and stopped on
request, else that of the first failure, 128 + n for signal n); TERM, USR1 and INT are handed on to the ranks and do
nothing else, whenever they come; ranks that were asked to stop have no time limit; and after a failure the others, on
every node, have `--grace` seconds to end.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from mf_train.errors import TrainingError, UserError
from mf_train.launch.logs import Copy, node_log, open_log, rank_log, say, size_of
from mf_train.launch.node import (
    FAILED,
    FORWARDED,
    MISTAKE,
    STOP_SIGNALS,
    STOPPED,
    Node,
    Ranks,
    find_node,
    raise_open_files,
)
from mf_train.launch.rank import AGENT_VARIABLE

GRACE_SECONDS = 30.0  # that ranks have to end after another has failed
MEET_SECONDS = 300.0  # that the agents of all nodes have to meet: srun starts them together
_COPY_SECONDS = 30.0  # for the rest of rank 0's output, where its reader is slow


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Exits with the status of the ranks, 2 where the environment lacks something, 1 where the agents cannot meet."""
    parser = argparse.ArgumentParser(
        prog="python -m mf_train.launch.agent",
        description="Starts the ranks of this node and waits for them.",
    )
    parser.add_argument("folder", type=Path, metavar="LOGS", help="a file for each rank and node goes here")
    parser.add_argument("per_node", type=int, metavar="PER_NODE", help="ranks to start on this node")
    parser.add_argument(
        "--grace",
        type=float,
        default=GRACE_SECONDS,
        metavar="SECONDS",
        help="that ranks have to end after another has failed (default: %(default)g)",
    )
    parser.add_argument(
        "--meet",
        type=float,
        default=MEET_SECONDS,
        metavar="SECONDS",
        help="that the agents of all nodes have to meet (default: %(default)g)",
    )
    parser.add_argument("command", nargs="+", metavar="-- train CONFIG ...", help="what each rank runs")
    options = parser.parse_args(arguments)
    worker = [sys.executable, "-m", "mf_train.launch.rank", str(options.folder), "--", *options.command]
    try:
        node = find_node(os.environ, options.per_node)
        status = run_agent(node, options.folder, worker, options.grace, options.meet)
    except (UserError, TrainingError, OSError) as error:
        print(f"memoryformer: {error}", file=sys.stderr, flush=True)
        status = MISTAKE if isinstance(error, UserError) else FAILED
    except BaseException:
        traceback.print_exc()
        status = FAILED
    _leave(status)


def run_agent(
    node: Node,
    folder: Path,
    worker: list[str],
    grace: float = GRACE_SECONDS,
    meet: float = MEET_SECONDS,
) -> int:
    """Start the node's ranks with the command `worker`, wait for them, and give the status that all nodes end with.

    Called once in a process, by its main thread. Standard output and error of this process become the node's log; the
    copy of rank 0's log, and the line of the first failure, go to what they were. Raises TrainingError where the agents
    cannot meet, OSError where the log cannot be written.
    """
    # Blocked in every thread that comes: one thread takes them, also while another waits in C++ for other nodes.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    raise_open_files()
    ranks = Ranks(socket.gethostname(), grace)
    threading.Thread(target=_take_signals, args=[ranks], name="signals", daemon=True).start()
    try:
        log = open_log(node_log(folder, node.number))
    except OSError as error:
        raise OSError(f"{folder}: logs cannot be written on {ranks.host}: {error}") from None
    output, errors = os.dup(1), os.dup(2)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    first = rank_log(folder, 0)
    copy = Copy(first, output, size_of(first)) if node.number == 0 else None
    try:
        return _run_ranks(node, ranks, worker, errors, meet)
    except TrainingError as error:
        say(2, f"memoryformer: {error}")
        raise
    finally:
        if copy is not None:
            copy.close(_COPY_SECONDS)
        for descriptor, before in ((1, output), (2, errors)):
            os.dup2(before, descriptor)


def _run_ranks(node: Node, ranks: Ranks, worker: list[str], errors: int, meet: float) -> int:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)  # torchrun's own words: into the node's log
    os.environ[AGENT_VARIABLE] = str(os.getpid())
    from mf_train.launch.torch_elastic import make_agent  # torch takes seconds; signals are taken before

    agent = make_agent(node, ranks, worker, errors, meet)
    try:
        agent.run()
    except RuntimeError as error:  # of the store: DistError is one
        if ranks.starting:
            raise
        raise TrainingError(_describe_meeting(node, ranks, error)) from None
    assert agent.peers is not None
    status = ranks.status()
    agreed = agent.peers.settle(status)
    if agreed != status:
        say(2, f"node {node.number} on {ranks.host} ends with {agreed}, as all nodes do, not with {status}")
    return agreed


def _describe_meeting(node: Node, ranks: Ranks, error: Exception) -> str:
    cause = str(error).partition("\n")[0].partition("Exception raised from")[0].strip()
    place = f"{node.master_address}:{node.master_port}"
    return f"node {node.number} of {node.nodes} on {ranks.host} could not meet the others at {place}: {cause}"


def _take_signals(ranks: Ranks) -> None:
    """Hand signals on to the ranks. Before any was started, end: there is nothing to save."""
    while True:
        number = signal.sigwait(FORWARDED)
        with ranks.lock:
            ranks.stop = signal.Signals(number)
            if not ranks.starting:
                say(2, f"{ranks.host}: asked to stop by {ranks.stop.name} before its ranks were started")
                _leave(STOPPED if number in STOP_SIGNALS else 128 + number)
            ranks.send(number)


def _leave(status: int) -> NoReturn:
    """End without Python's clearing up, which waits for ever for a thread that waits for the store."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
