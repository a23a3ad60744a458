"""Writing a checkpoint: every rank writes its own fragments to their places; the folder is complete or absent.

    start     all ranks copy what they hold to host memory, or leave it where it is if no step follows
    write     each writes its fragments into the files, whose layout all know, and waits until they are on disk; the
              checksums are those of the memory that it writes from
    complete  rank 0 writes the manifest, renames the folder, moves `latest` and deletes what is not kept

All but the first run in a thread; the ranks agree on going from one to the next at step boundaries. No parameter is
sent to another rank.
"""

import json
import math
import os
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.checkpoint.checksum import PIECE_BYTES, continue_crc, crc_of_file, shifted
from mf_train.checkpoint.fence import Fence
from mf_train.checkpoint.layout import (
    CONFIG,
    LATEST,
    MANIFEST,
    PROBE,
    STATE,
    FileRecord,
    Manifest,
    assign_parts,
    format_of,
    list_checkpoints,
    part_name,
    step_name,
    step_of,
)
from mf_train.checkpoint.safetensors_file import FileLayout, bytes_of, file_bytes
from mf_train.config import CheckpointConfig
from mf_train.errors import PeerError, TrainingError
from mf_train.files import beside, path_in_errors, remove_folder, sync, write_synced
from mf_train.model.sharding import whole_shape
from mf_train.parallel.agreement import SIGN_OF_LIFE_SECONDS, Task, any_rank, exclusive_or, run_on_all
from mf_train.parallel.engine import Engine
from mf_train.parallel.stored import Stored


@dataclass(frozen=True)
class Extras:
    """The contents of a checkpoint beside the tensors."""

    state: Mapping[str, Any]
    config_yaml: str
    tokenizer: Mapping[str, bytes]  # its files; none where the run has only token ids
    probe: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Piece:
    """A fragment of a parameter that this rank writes."""

    kind: str
    name: str
    file: str
    offset: int  # of its first byte in the file
    first: int  # of its elements in this rank's fragment
    numel: int


def _ignore(*_: object) -> None:
    return None


class Saver:
    """Writes a run's checkpoints into its `checkpoints/` folder, one at a time, beside the steps or while they wait.

    `last` is the newest complete checkpoint, `step` that of the newest one, complete or under way, and `seconds` what
    the last save took from its start to its end. A resumed run gives those of the run that it continues.

    All calls but `take_metrics` are collective over all ranks. They raise TrainingError on rank 0 where any rank could
    not write, or where a newer start of the run has taken the folder over, and PeerError on the other ranks. While a
    call waits, `entering` is told what this rank does, the same number of times on every rank, and `still_alive` is
    called when that advances.
    """

    def __init__(
        self,
        engine: Engine,
        fence: Fence,
        config: CheckpointConfig,
        *,
        last: Path | None = None,
        step: int = 0,
        seconds: float = 0.0,
        entering: Callable[[str], None] = _ignore,
        still_alive: Callable[[], None] = _ignore,
    ) -> None:
        self.engine = engine
        self.fence = fence
        self.config = config
        self.last, self.step, self.seconds = last, step, seconds
        self.entering, self.still_alive = entering, still_alive
        degrees = engine.groups.degrees
        shapes = {name: engine.local_shape(p) for name, p in engine.model.named_parameters()}
        self.parts = assign_parts({name: 4 * shape.numel() for name, shape in shapes.items()})
        layouts = part_layouts(shapes, self.parts)
        self.parameters = {name: whole_shape(name, shape, degrees.tensor) for name, shape in shapes.items()}
        self.sizes = {
            part_name(kind, rank, degrees.tensor, part): layout.size
            for kind in engine.kinds
            for rank in range(degrees.tensor)
            for part, layout in layouts.items()
        }
        self.headers = {
            part_name(kind, degrees.tensor_rank, degrees.tensor, part): layout.header
            for kind in engine.kinds
            for part, layout in layouts.items()
            if degrees.data_rank == 0
        }
        self.pieces = self._plan_pieces(layouts)
        self._check_pieces()
        self.buffers: dict[tuple[str, str], Stored] = {}
        self._task: Task[Any] | None = None
        self._doing = ""
        self._began = 0.0
        self._pieces_written = 0
        self._metrics: dict[str, float] = {}
        if config.interval and config.asynchronous:
            self._prepare_buffers()  # now: the first copy is as quick as the later ones then

    def start(self, step: int, extras: Extras | None, *, wait: bool, began: float | None = None) -> None:
        """Save the engine's state as that of `step`; rank 0 gives `extras`. The last save must be complete.

        With `wait` the save is complete when this returns; without, training may continue meanwhile. `began` is when
        (perf_counter) the run left its steps to make `extras`.
        """
        assert self._task is None
        self._began = time.perf_counter() if began is None else began
        self.step, self.partial = step, self.fence.partial(step)
        self._guarded(lambda: run_on_all(self._prepare, self.engine.device))
        # pinned buffers that are there already: the copy is several times as quick as one to other memory
        pinned = bool(self.buffers) and self.engine.device.type == "cuda"
        values = self._values() if wait and not pinned else self._copies()
        self._doing = "writing"
        self._task = Task(lambda: self._write(values, extras))
        self._count_stall(self._began)
        if wait:
            self.finish()

    def advance(self) -> None:
        """Continue with what was started, without waiting; takes no time where nothing was."""
        if self._task is not None:
            self._advance(self._task, self._task.busy)

    def finish(self) -> None:
        """Wait until what was started is complete."""
        if self._task is None:
            return
        started = time.perf_counter()
        while (task := self._task) is not None:
            self._finish(task)
        self._count_stall(started)

    def take_metrics(self) -> dict[str, float]:
        """Seconds since the last call that the steps waited for saving, and those from a save's start to its end."""
        taken, self._metrics = self._metrics, {}
        return taken

    def _finish(self, task: Task[Any]) -> None:
        """Wait until one stage of the save is over on all ranks."""
        self.entering(f"{self._doing} the checkpoint of step {self.step}")
        waiting = False
        while self._task is task:
            written = self._pieces_written
            task.wait(SIGN_OF_LIFE_SECONDS)
            if self._pieces_written != written:
                self.still_alive()
            busy = task.busy
            if not busy and not waiting:
                self.entering(f"waiting for others that are {self._doing} the checkpoint of step {self.step}")
                waiting = True
            self._advance(task, busy)

    def _advance(self, task: Task[Any], busy: bool) -> None:
        """Begin the next stage once no rank is busy with this one."""
        if any_rank([busy], self.engine.device)[0]:
            return
        self._task = None
        outcome = self._guarded(lambda: run_on_all(task.outcome, self.engine.device))
        if self._doing == "writing":
            self._doing, self._task = "completing", self._start_completing(*outcome)
            return
        self.last = self.fence.folder / step_name(self.step)
        self.seconds = self._metrics["checkpoint_seconds"] = time.perf_counter() - self._began

    def _count_stall(self, since: float) -> None:
        stall = self._metrics.get("checkpoint_stall_seconds", 0.0)
        self._metrics["checkpoint_stall_seconds"] = stall + time.perf_counter() - since

    # the stages of a save

    def _prepare(self) -> None:
        if self.engine.groups.degrees.rank == 0:
            self.fence.check()
            remove_folder(self.partial)
            self.partial.mkdir(parents=True)
            for file, size in self.sizes.items():
                # at their full size before others open them: an NFS client may fill a page behind what it takes for
                # the end, and so overwrite another's bytes
                with (self.partial / file).open("xb") as empty:
                    empty.truncate(size)

    def _values(self) -> dict[tuple[str, str], Stored]:
        """This rank's pieces by kind and name, where the engine has them."""
        fragments = self.engine.fragments()
        return {
            (piece.kind, piece.name): fragments[piece.name]
            .values[piece.kind]
            .narrow(piece.first, piece.numel)
            for piece in self.pieces
        }

    def _prepare_buffers(self) -> None:
        """Take the host memory for copies, as many bytes as the rank holds."""
        on_gpu = self.engine.device.type == "cuda"
        for key, held in self._values().items() if not self.buffers else ():
            empty = (torch.zeros(t.shape, dtype=t.dtype, pin_memory=on_gpu) for t in held.tensors)
            self.buffers[key] = replace(held, tensors=tuple(empty))

    def _copies(self) -> dict[tuple[str, str], Stored]:
        """This rank's pieces by kind and name, copied to host memory."""
        self._prepare_buffers()
        for key, held in self._values().items():
            for copy, tensor in zip(self.buffers[key].tensors, held.tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return self.buffers

    def _write(
        self, values: Mapping[tuple[str, str], Stored], extras: Extras | None
    ) -> tuple[list[int], dict[str, FileRecord]]:
        """Write this rank's pieces; returns their `crc_of_piece` in each file, and the extras' records."""
        crcs = dict.fromkeys(self.sizes, 0)
        by_file: dict[str, list[_Piece]] = {}
        for piece in self.pieces:
            by_file.setdefault(piece.file, []).append(piece)
        for file in {**by_file, **self.headers}:
            size = self.sizes[file]
            path = self.partial / file
            descriptor = os.open(path, os.O_WRONLY)
            try:
                with path_in_errors(path):
                    if file in self.headers:
                        crcs[file] ^= _write_at(descriptor, memoryview(self.headers[file]), 0, size)
                    for piece in by_file.get(file, ()):
                        held = values[piece.kind, piece.name]
                        for first, numel in held.pieces():
                            data = held.narrow(first, numel).read().cpu()
                            crcs[file] ^= _write_at(
                                descriptor, bytes_of(data), piece.offset + 4 * first, size
                            )
                        self._pieces_written += 1
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return list(crcs.values()), {} if extras is None else write_extras(self.partial, extras)

    def _start_completing(self, crcs: list[int], records: dict[str, FileRecord]) -> Task[None]:
        totals = exclusive_or(crcs, self.engine.device)
        for (name, size), total in zip(self.sizes.items(), totals, strict=True):
            records[name] = FileRecord(size, crc_of_file(total, size))
        first = self.engine.groups.degrees.rank == 0
        return Task(lambda: self._complete(records) if first else None)

    def _complete(self, records: dict[str, FileRecord]) -> None:
        folder, name = self.fence.folder, step_name(self.step)
        manifest = Manifest(
            format=format_of(self.engine.kinds),
            step=self.step,
            tensor_parallel=self.engine.groups.degrees.tensor,
            kinds=self.engine.kinds,
            parameters=self.parameters,
            parts=self.parts,
            files=records,
        )
        write_synced(self.partial / MANIFEST, manifest.to_json().encode())
        sync(self.partial)
        for file, record in records.items():
            if (size := (self.partial / file).stat().st_size) != record.size:
                raise OSError(f"{file} has {size} bytes instead of {record.size}: check the storage")
        # a newer start deletes both, so that neither can take its place once this one was held up here
        latest = beside(folder / LATEST, self.fence.token)
        write_synced(latest, f"{name}\n".encode())
        self.fence.check()
        os.rename(self.partial, folder / name)
        os.replace(latest, folder / LATEST)
        sync(folder)
        self.fence.check()
        for old in surplus(list_checkpoints(folder), self.config.keep, self.config.keep_every):
            try:
                remove_folder(old)
            except OSError as error:
                print(f"{old}: could not be deleted ({error.strerror}); delete it by hand", flush=True)

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """Run a part of a save; where it fails, delete what was written and raise the error that the user sees."""
        try:
            return action()
        except (OSError, PeerError, TrainingError) as error:
            if self.engine.groups.degrees.rank != 0 or isinstance(error, PeerError):
                raise
            with suppress(OSError):
                remove_folder(self.partial)
                beside(self.fence.folder / LATEST, self.fence.token).unlink(missing_ok=True)
            self.fence.check()  # whatever failed, a newer start is the better reason
            complete = [path.name for path in list_checkpoints(self.fence.folder)]
            raise TrainingError(
                f"{self.fence.folder}: the checkpoint of step {self.step} could not be written "
                f"({error}); the newest complete one is {complete[-1] if complete else 'none'}: make room "
                "or mend the folder, and run again"
            ) from error

    def _plan_pieces(self, layouts: Mapping[int, FileLayout]) -> list[_Piece]:
        """The fragments that this rank writes: what it alone holds, or an even share of what all hold."""
        degrees = self.engine.groups.degrees
        pieces = []
        for name, fragment in self.engine.fragments().items():
            first, last = 0, fragment.numel
            if self.engine.replicated:
                unit = math.lcm(*(held.unit for held in fragment.values.values()))
                units = fragment.numel // unit
                first, last = (unit * (units * (degrees.data_rank + i) // degrees.data) for i in (0, 1))
            part = self.parts[name]
            offset = layouts[part].offsets[name] + 4 * (fragment.start + first)
            for kind in self.engine.kinds if last > first else ():
                file = part_name(kind, degrees.tensor_rank, degrees.tensor, part)
                pieces.append(_Piece(kind, name, file, offset, first, last - first))
        return pieces

    def _check_pieces(self) -> None:
        """A piece that no rank writes would be zeros, which no checksum shows."""
        lengths = {file: len(self.headers.get(file, b"")) for file in self.sizes}
        for piece in self.pieces:
            lengths[piece.file] += 4 * piece.numel
        total = torch.tensor(list(lengths.values()), dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(total)
        assert total.tolist() == list(self.sizes.values()), "the ranks' pieces do not make up the files"


def surplus(checkpoints: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Checkpoints to delete, of all, oldest first: neither the newest `keep` nor one each `keep_every` steps."""
    older = checkpoints[:-keep] if keep else []
    return [path for path in older if not keep_every or step_of(path) % keep_every]


def part_layouts(shapes: Mapping[str, torch.Size], parts: Mapping[str, int]) -> dict[int, FileLayout]:
    return {
        part: FileLayout({name: (torch.float32, shapes[name]) for name in shapes if parts[name] == part})
        for part in sorted(set(parts.values()))
    }


def _write_at(descriptor: int, data: memoryview, offset: int, size: int) -> int:
    """Write bytes at a place of a file of `size` bytes; returns their `crc_of_piece`."""
    register, begin = 0, 0
    while begin < len(data):
        piece = data[begin : begin + PIECE_BYTES]
        written = os.pwrite(descriptor, piece, offset + begin)
        register = continue_crc(register, piece[:written])
        begin += written
    return shifted(register, size - offset - len(data))


def write_extras(folder: Path, extras: Extras) -> dict[str, FileRecord]:
    """Write what lies beside a checkpoint's tensors, synced; returns each file's record. Raises OSError."""
    files = {
        STATE: (json.dumps(extras.state, indent=1) + "\n").encode(),
        CONFIG: extras.config_yaml.encode(),
    }
    files |= extras.tokenizer
    files[PROBE] = file_bytes(extras.probe)
    for name, data in files.items():
        write_synced(folder / name, data)
    return {name: FileRecord(len(data), zlib.crc32(data)) for name, data in files.items()}
