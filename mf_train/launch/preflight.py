"""What one process of `memoryformer launch --check` measures: `python -m mf_train.launch.preflight FOLDER BYTES cpu`.

Started by srun, one process a GPU (`cuda`) or task (`cpu`). Each prints lines `@preflight {json}` of less than 1 000
bytes, so that srun passes them on whole. Each stage leaves a line: the last one tells how far a process came. Stages:

    node     versions, memory, limits, names, the compiler that Triton needs; GPUs that each process sees
    met      all processes found each other at the first node, each with a GPU of its own
    clock    difference to rank 0's clock, by the round trip that was shortest
    memory   copies inside the device's memory, GB read and written a second
    kernel   a hash and a lookup on every device agree with the float64 reference; what computed them
    storage  a file written, synced, and the next node's read back, bytes a second
    names    how old a file is seen that another node replaced; whether a folder that was moved away is gone for all
    network  all-reduces inside the node and across nodes, and exchanges with the next node, GB a second
    done

Bus bandwidth of an all-reduce of S bytes by n ranks in t seconds: S / t * 2 (n - 1) / n, as nccl-tests defines it in
doc/PERFORMANCE.md.
"""

import json
import os
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from mf_train.errors import UserError
from mf_train.launch.machine import compiler_problem, cuda_versions, name_problem, resources, versions
from mf_train.parallel.processes import Process, find_process

MARK = "@preflight "
PIECE = 4 << 20  # bytes of a write or read
STORAGE_SECONDS = 8.0  # at most, for writing, and for reading
PATIENCE = 45  # seconds to wait for the others
CPU_BYTES, GPU_BYTES = 8 << 20, 256 << 20  # of a message


class Place:
    """Where this process is: its rank, its node's number, and the folder and store that all share."""

    def __init__(self, process: Process, folder: Path) -> None:
        self.process = process
        self.nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
        self.on_node = process.world_size // self.nodes
        self.node, self.local = divmod(process.rank, self.on_node)
        self.name = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        self.folder = folder
        self.store: Any = None  # of torch, which is imported late
        self.device: Any = None

    def say(self, stage: str, **values: Any) -> None:
        """Prints a line for the one who reads all processes' output."""
        line = json.dumps({"rank": self.process.rank, "node": self.name, "stage": stage, **values})
        os.write(1, f"\n{MARK}{line}\n".encode())

    def meet(self, name: str, processes: int) -> None:
        """Waits for that many processes, rank 0 among them. TimeoutError in all of them where not all came in time."""
        self.store.add(name, 1)
        if self.process.rank == 0:
            deadline = time.monotonic() + PATIENCE
            while (come := self.store.add(name, 0)) < processes and time.monotonic() < deadline:
                time.sleep(0.02)
            self.store.set(f"{name}/all", str(come >= processes))
        if self.store.get(f"{name}/all") != b"True":
            raise TimeoutError(f"not all of {processes} processes came to {name!r} within {PATIENCE} s")


def main(folder: Path, size: int, kind: str) -> None:
    """Measures and prints, stage by stage, and ends the process: 0, or 1 after the stage that failed."""
    place = Place(find_process(), folder)
    stages: dict[str, Callable[[], None]] = {
        "node": lambda: say_node(place, kind),
        "met": lambda: find_others(place),
        "clock": lambda: say_clock(place),
        "memory": lambda: say_memory(place),
        "kernel": lambda: say_kernel(place),
        "storage": lambda: say_storage(place, size),
        "names": lambda: say_names(place),
        "network": lambda: say_network(place),
    }
    for stage, run in stages.items():
        try:
            run()
        except Exception as error:  # whatever it is: a line for the table
            place.say("failed", during=stage, error=_words(error))
            os._exit(1)  # a communicator that lost its peers would wait for them
    place.say("done")
    with suppress(Exception):
        place.meet("end", place.process.world_size)  # rank 0 holds the store
        time.sleep(0.2 if place.process.rank == 0 else 0)
    os._exit(0)


def say_node(place: Place, kind: str) -> None:
    """The stage `node`: what there is, without torch first, since that may be what is missing."""
    if not place.local:
        if not place.folder.is_dir():
            raise FileNotFoundError(
                f"{place.folder} is not there: is it on a file system that all nodes share?"
            )
        place.say("node", versions=versions(), resources=resources(place.folder))
        if place.nodes > 1 and (problem := name_problem(place.process.master_address, kind == "cpu")):
            place.say("node", problem=problem)
        if kind == "cuda" and (problem := compiler_problem()):
            place.say("node", problem=problem)
    import torch

    from mf_train.training.device import gpu_index

    place.say(
        "node", gpus=torch.cuda.device_count(), **({} if place.local else {"versions": cuda_versions()})
    )
    torch.set_num_threads(1)
    place.device = torch.device("cpu")
    if kind == "cuda":
        place.device = torch.device("cuda", gpu_index(place.local, torch.cuda.device_count()))
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a lost peer is an error, not the process's end


def find_others(place: Place) -> None:
    """The stage `met`: the store at the first node, and all processes there."""
    import torch.distributed as dist

    place.store = dist.TCPStore(
        place.process.master_address,
        place.process.master_port,
        is_master=place.process.rank == 0,
        timeout=timedelta(seconds=2 * PATIENCE),
        wait_for_workers=False,
    )
    if place.device.type == "cuda":
        from mf_train.parallel.groups import claim_gpu, gpu_uuid

        claim_gpu(place.store, place.process.rank, gpu_uuid(place.device))
    place.meet("met", place.process.world_size)
    place.say("met")


def say_clock(place: Place) -> None:
    """The stage `clock`: seconds by which this node's clock is ahead of rank 0's, and the round trip's."""
    if place.process.rank == 0:
        place.store.set("clock", str(_serve_clock()))
    if place.local or place.process.rank == 0:
        return
    best = (float("inf"), 0.0)
    address = (place.process.master_address, int(place.store.get("clock")))
    with socket.create_connection(address, timeout=PATIENCE) as peer:
        for _ in range(20):
            before = time.time()
            peer.sendall(b"?")
            there = struct.unpack("d", peer.recv(8, socket.MSG_WAITALL))[0]
            after = time.time()
            best = min(best, (after - before, (before + after) / 2 - there))
    place.say("clock", skew=round(best[1], 6), round_trip=round(best[0], 6))


def _serve_clock() -> int:
    """Answers every byte with the time, in threads that end with the process; returns the port."""
    listener = socket.create_server(("", 0), backlog=512)

    def answer(peer: socket.socket) -> None:
        with peer:
            while peer.recv(1):
                peer.sendall(struct.pack("d", time.time()))

    def serve() -> None:
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


def say_memory(place: Place) -> None:
    """The stage `memory`: GB/s read and written by copies of 64 MiB, of 1 GiB (or what is free) on a GPU."""
    import torch

    device, size = place.device, 64 << 20
    if device.type == "cuda":
        torch.cuda.set_device(device)
        size = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 4)
    target = torch.empty(size // 4, device=device)
    place.say("memory", copy=_significant(2 * bandwidth(device, size, target.copy_)))


def bandwidth(device: Any, size: int, run: Callable[[Any], Any]) -> float:
    """`size` bytes in the shortest time of five, in GB/s, in which `run` deals with a tensor of that size."""
    import torch

    data, best = torch.ones(size // 4, device=device), float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        before = time.perf_counter()
        run(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return size / best / 1e9


def say_kernel(place: Place) -> None:
    """The stage `kernel`: what a run compiles first, and whether it computes right. One process of a node compiles."""
    from mf_train.training.environment import set_kernel_cache
    from mf_train.training.kernel_check import check_kernels

    first, turn = not place.local, f"kernel/{place.node}"
    if place.device.type == "cuda":
        set_kernel_cache(os.environ)
    if not first:
        place.store.get(turn)
    try:
        kind = check_kernels(place.device)
    finally:
        if first:
            place.store.set(turn, "")
    place.say("kernel", **({"versions": {"hash and lookup": kind}} if first else {}))


def say_storage(place: Place, size: int) -> None:
    """The stage `storage`: the node's first process writes `size` bytes, or what it can in some seconds, syncs them,
    and reads the file of the next node.
    """
    if place.local:
        return
    own, problem, written, rate = place.folder / f"data-{place.node}", None, 0, 0.0
    place.meet("write", place.nodes)
    try:
        written, rate = write_file(own, size, place.node)
    except OSError as error:
        own.unlink(missing_ok=True)
        problem = f"{error.strerror or error}, when it wrote {size / 1e6:.0f} MB to {place.folder}"
    place.store.set(f"written/{place.node}", str(0 if problem else written))
    place.say("storage", **({"problem": problem} if problem else {"write": round(rate)}))
    place.meet("written", place.nodes)
    next_node = (place.node + 1) % place.nodes
    if length := int(place.store.get(f"written/{next_node}")):
        try:
            rate = read_file(place.folder / f"data-{next_node}", length, next_node)
            place.say("storage", read=round(rate))
        except OSError as error:
            place.say("storage", problem=str(error)[:400])
    place.meet("read", place.nodes)
    own.unlink(missing_ok=True)


def write_file(path: Path, size: int, seed: int) -> tuple[int, float]:
    """Writes pieces of 4 MiB until there are `size` bytes or STORAGE_SECONDS have passed, and syncs; returns the bytes
    and bytes a second. Raises OSError.
    """
    piece, written, before = random.Random(seed).randbytes(PIECE), 0, time.perf_counter()
    with path.open("wb", buffering=0) as file:
        while written < size and (written == 0 or time.perf_counter() - before < STORAGE_SECONDS):
            written += file.write(piece)
            if written % (16 * PIECE) == 0:
                os.fsync(file.fileno())  # a slow disk is found out before all is in memory
        os.fsync(file.fileno())
        seconds = time.perf_counter() - before
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return written, written / seconds


def read_file(path: Path, length: int, seed: int) -> float:
    """Reads what another node wrote, some seconds at most, and returns bytes a second. OSError where it is not that."""
    if path.stat().st_size != length:
        raise OSError(f"{path} has {path.stat().st_size} bytes here and {length} where it was written")
    piece, done, before = random.Random(seed).randbytes(PIECE), 0, time.perf_counter()
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or it comes from this node's memory
        while done < length and time.perf_counter() - before < STORAGE_SECONDS:
            data = file.read(PIECE)
            start = done % PIECE
            if not data or data != piece[start : start + len(data)]:
                raise OSError(f"{path}: what is read at byte {done} is not what was written")
            done += len(data)
    return done / (time.perf_counter() - before)


def say_names(place: Place) -> None:
    """The stage `names`, what the fence of checkpoints relies on (checkpoint/fence.py): rank 0 replaces a file twice,
    and renames a folder of every node; how long each node sees the file before, and whether it can still rename.
    """
    if place.local:
        return
    first, writer, seen = place.process.rank == 0, place.folder / "writer", 0.0
    moved = place.folder / f"folder-{place.node}"
    moved.mkdir()
    for round_ in ("1", "2"):
        if first:
            writer.with_suffix(".new").write_text(round_)
            os.replace(writer.with_suffix(".new"), writer)
        place.meet(f"replaced {round_}", place.nodes)
        seen = max(seen, _seconds_until(writer, round_))
        place.meet(f"seen {round_}", place.nodes)
    if first:
        for node in range(place.nodes):
            os.rename(place.folder / f"folder-{node}", place.folder / f"moved-{node}")
    place.meet("moved", place.nodes)
    problem = None
    try:
        os.rename(moved, place.folder / f"kept-{place.node}")
        problem = "could rename a folder that another node had moved away: an old start could complete a save"
    except FileNotFoundError:
        pass
    place.say("names", seen=round(seen, 3), **({"problem": problem} if problem else {}))


def _seconds_until(path: Path, text: str) -> float:
    before = time.monotonic()
    while not path.is_file() or path.read_text() != text:
        if time.monotonic() - before > PATIENCE / 2:
            raise TimeoutError(f"{path}, replaced on another node, is not seen after {PATIENCE / 2:.0f} s")
        time.sleep(0.005)
    return time.monotonic() - before


def say_network(place: Place) -> None:
    """The stage `network`: all-reduces in groups of a node and of a local rank, then each node with the next."""
    import torch
    import torch.distributed as dist

    process, device, wait = place.process, place.device, timedelta(seconds=PATIENCE)
    place.meet("network", process.world_size)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", place.store),
        rank=process.rank,
        world_size=process.world_size,
        timeout=wait,
    )
    small = torch.ones(1 << 18, device=device)
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    dist.all_reduce(small)  # all ranks of the world: NCCL wants that before some of them exchange
    start = place.node * place.on_node
    groups = {"inside": range(start, start + place.on_node)}
    groups["across"] = range(place.local, process.world_size, place.on_node)
    for name, ranks in groups.items():
        if (n := len(ranks)) > 1:
            group = dist.new_group(list(ranks), timeout=wait, use_local_synchronization=True)
            dist.all_reduce(small, group=group)  # opens connections
            rate = bandwidth(device, size, partial(dist.all_reduce, group=group))
            place.say("network", **{name: _significant(rate * 2 * (n - 1) / n)})
    for turn in range(3):
        for link, node in links_of(place.node, place.nodes, turn):
            peer = node * place.on_node + place.local
            exchange(small, peer)  # opens connections, and waits for a peer that is still busy
            rate = bandwidth(device, size, partial(exchange, peer=peer))
            if link == place.node:
                place.say("network", link=_significant(rate))
    dist.all_reduce(small)


def exchange(data: Any, peer: int) -> None:
    """Sends a tensor to a peer that sends as much at the same time."""
    import torch
    import torch.distributed as dist

    ways = [dist.P2POp(dist.isend, data, peer), dist.P2POp(dist.irecv, torch.empty_like(data), peer)]
    for work in dist.batch_isend_irecv(ways):
        work.wait()


def links_of(node: int, nodes: int, turn: int) -> list[tuple[int, int]]:
    """The link on which this node measures in a turn, and the peer: link i joins node i and the next; [] for none.

    Links of one turn share no node, so the whole ring takes 2 turns, or 3 where the number of nodes is odd.
    """
    links = [(node, (node + 1) % nodes), ((node - 1) % nodes, (node - 1) % nodes)]
    if nodes < 3:
        links = [(0, 1 - node)] if nodes == 2 else []
    return [
        (link, peer) for link, peer in links if turn == (2 if nodes % 2 and link == nodes - 1 else link % 2)
    ]


def _significant(rate: float) -> float:
    return float(f"{rate:.4g}")


def _words(error: BaseException) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


if __name__ == "__main__":
    if len(sys.argv) != 4 or not sys.argv[2].isdigit() or sys.argv[3] not in ("cpu", "cuda"):
        sys.exit("usage: srun ... python -m mf_train.launch.preflight FOLDER BYTES cpu|cuda")
    try:
        main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    except UserError as error:
        sys.exit(f"preflight: {error}")
