"""Writing a checkpoint: every rank writes its own fragments to their places; the folder is complete or absent.

    start     all ranks copy what they hold to host memory, or leave it where it is if no step follows
    write     each writes its fragments into the files, whose layout all know, and waits until they are on disk
    check     each reads an even share of all files back; the checksums must be those of what was written
    complete  rank 0 writes the manifest, renames the folder, moves `latest` and deletes what is not kept

All but the first run in a thread; the ranks agree on going from one to the next at step boundaries. No parameter is
sent to another rank.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mf_train.checkpoint.checksum import PIECE_BYTES, extend, place, read_shares, whole
from mf_train.checkpoint.fence import Fence
from mf_train.checkpoint.layout import (
    CONFIG,
    FORMAT,
    KINDS,
    LATEST,
    MANIFEST,
    PROBE,
    STATE,
    TOKENIZER,
    FileRecord,
    Manifest,
    assign_parts,
    list_checkpoints,
    part_name,
    step_name,
    step_of,
)
from mf_train.checkpoint.safetensors_file import FileLayout, TensorFileWriter
from mf_train.config import CheckpointConfig
from mf_train.errors import PeerError, TrainingError
from mf_train.files import beside, path_in_errors, remove_folder, sync, write_synced
from mf_train.model.sharding import whole_shape
from mf_train.parallel.agreement import (
    SIGN_OF_LIFE_SECONDS,
    Task,
    any_rank,
    exclusive_or,
    together,
)
from mf_train.parallel.engine import Engine


@dataclass(frozen=True)
class Extras:
    """What a checkpoint holds beside the tensors."""

    state: Mapping[str, Any]
    config_yaml: str
    tokenizer: bytes  # empty where the run has only token ids
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


def _ignore(*_: Any) -> None:
    return None


class Saver:
    """Writes an engine's checkpoints into a run's `checkpoints/` folder, one at a time. All calls are collective.

    Each raises TrainingError on rank 0 where any rank could not write, where what was written reads back otherwise, or
    where a newer start of the run has taken the folder over, and PeerError on the other ranks.
    """

    def __init__(self, engine: Engine, fence: Fence, config: CheckpointConfig) -> None:
        self.engine = engine
        self.fence = fence
        self.config = config
        degrees = engine.groups.degrees
        shapes = {name: engine.local_shape(p) for name, p in engine.model.named_parameters()}
        self.parts = assign_parts({name: 4 * shape.numel() for name, shape in shapes.items()})
        layouts = part_layouts(shapes, self.parts)
        self.parameters = {name: whole_shape(name, shape, degrees.tensor) for name, shape in shapes.items()}
        self.sizes = {
            part_name(kind, rank, degrees.tensor, part): layout.size
            for kind in KINDS
            for rank in range(degrees.tensor)
            for part, layout in layouts.items()
        }
        self.headers = {
            part_name(kind, degrees.tensor_rank, degrees.tensor, part): layout.header
            for kind in KINDS
            for part, layout in layouts.items()
            if degrees.data_rank == 0
        }
        self.pieces = self._plan_pieces(layouts)
        self.buffers: dict[tuple[str, str], Tensor] = {}
        self._task: Task[Any] | None = None
        self._next: Callable[[Any], Task[Any] | None] = _ignore
        self._doing = ""
        self._moved = 0  # pieces written or read back so far

    def prepare_buffers(self) -> None:
        """Take the host memory for copies, 4 bytes a value, now: the first copy is as quick as the later ones then."""
        on_gpu = self.engine.device.type == "cuda"
        for piece in self.pieces if not self.buffers else ():
            self.buffers[piece.kind, piece.name] = torch.zeros(piece.numel, pin_memory=on_gpu)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint has been started and is not complete."""
        return self._task is not None

    def start(self, step: int, extras: Extras | None, *, copy: bool) -> None:
        """Begin to save the engine's state as that of `step`; rank 0 gives `extras`. The last one must be complete.

        With `copy` training may go on as soon as this returns; without, not before `finish` has.
        """
        assert not self.pending
        self.step, self.partial = step, self.fence.partial(step)
        self._guarded(lambda: together(self._prepare, self.engine.device))
        # pinned buffers that are there already: the copy is several times as quick as one to other memory
        pinned = bool(self.buffers) and self.engine.device.type == "cuda"
        values = self._copies() if copy or pinned else self._values()
        self._doing, self._next = "writing", self._to_check
        self._task = Task(lambda: self._write(values, extras))

    def advance(self) -> Path | None:
        """Go on with what was started, without waiting; the checkpoint's folder once it is complete, else None."""
        return None if self._task is None else self._advance(self._task, self._task.busy)

    def finish(self, at: Callable[[str], None] = _ignore, beat: Callable[..., None] = _ignore) -> Path | None:
        """Wait for what was started; the checkpoint's folder, or None where nothing was started.

        `at` is told, the same number of times on every rank, what the rank does; `beat` is called when that advances.
        """
        path = None
        while (task := self._task) is not None:
            at(f"{self._doing} the checkpoint of step {self.step}")
            told = False
            while self._task is task:
                moved = self._moved
                task.wait(SIGN_OF_LIFE_SECONDS)
                if self._moved != moved:
                    beat()
                busy = task.busy
                if not busy and not told:
                    at(f"waiting for others that are {self._doing} the checkpoint of step {self.step}")
                    told = True
                path = self._advance(task, busy)
        return path

    def _advance(self, task: Task[Any], busy: bool) -> Path | None:
        if any_rank([busy], self.engine.device)[0]:
            return None
        self._task = None
        self._task = self._guarded(lambda: self._next(together(task.outcome, self.engine.device)))
        return self.fence.folder / step_name(self.step) if self._task is None else None

    def _move(self) -> None:
        self._moved += 1

    # the steps of a save

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

    def _values(self) -> dict[tuple[str, str], Tensor]:
        """This rank's pieces by kind and name, where the engine has them."""
        fragments = self.engine.fragments()
        values = {}
        for piece in self.pieces:
            fragment = fragments[piece.name]
            if piece.kind == "master":
                held = fragment.of(fragment.flat.detach())
            else:
                held = self.engine.moment(fragment, piece.kind)
            values[piece.kind, piece.name] = held.narrow(0, piece.first, piece.numel)
        return values

    def _copies(self) -> dict[tuple[str, str], Tensor]:
        """This rank's pieces by kind and name, copied to host memory."""
        self.prepare_buffers()
        for key, held in self._values().items():
            self.buffers[key].copy_(held, non_blocking=True)
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return self.buffers

    def _write(
        self, values: Mapping[tuple[str, str], Tensor], extras: Extras | None
    ) -> tuple[list[int], dict[str, FileRecord]]:
        """Write this rank's pieces; returns the shares of each file's checksum, and the extras' records."""
        shares = dict.fromkeys(self.sizes, 0)
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
                        shares[file] ^= _write_at(descriptor, memoryview(self.headers[file]), 0, size)
                    for piece in by_file.get(file, ()):
                        data = values[piece.kind, piece.name].to("cpu", torch.float32).contiguous()
                        view = data.view(torch.uint8).numpy().data
                        shares[file] ^= _write_at(descriptor, view, piece.offset, size)
                        self._move()
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return list(shares.values()), {} if extras is None else write_extras(self.partial, extras)

    def _to_check(self, written: tuple[list[int], dict[str, FileRecord]]) -> Task[Any]:
        shares, records = written
        held = torch.tensor(list(self._lengths().values()), dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(held)
        assert held.tolist() == list(self.sizes.values()), "the ranks' pieces do not make up the files"
        totals = exclusive_or(shares, self.engine.device)
        for (name, size), total in zip(self.sizes.items(), totals, strict=True):
            records[name] = FileRecord(size, whole(total, size))
        self._doing, self._next = "checking", lambda read: self._to_complete(read, records)
        degrees = self.engine.groups.degrees
        return Task(
            lambda: read_shares(self.partial, self.sizes, degrees.rank, degrees.world_size, self._move)
        )

    def _to_complete(self, read: list[int], records: dict[str, FileRecord]) -> Task[Any]:
        totals = exclusive_or(read, self.engine.device)
        wrong = [
            name
            for (name, size), total in zip(self.sizes.items(), totals, strict=True)
            if whole(total, size) != records[name].crc32
        ]
        rank = self.engine.groups.degrees.rank
        if wrong:
            if rank != 0:
                raise PeerError(1)
            raise OSError(f"{wrong[0]} reads back otherwise than it was written: check the storage")
        self._doing, self._next = "completing", lambda _: None
        return Task(lambda: self._complete(records) if rank == 0 else None)

    def _complete(self, records: dict[str, FileRecord]) -> None:
        folder, name = self.fence.folder, step_name(self.step)
        manifest = Manifest(
            format=FORMAT,
            step=self.step,
            tensor_parallel=self.engine.groups.degrees.tensor,
            kinds=KINDS,
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

    def _lengths(self) -> dict[str, int]:
        """Bytes that this rank writes into each file."""
        lengths = {file: len(self.headers.get(file, b"")) for file in self.sizes}
        for piece in self.pieces:
            lengths[piece.file] += 4 * piece.numel
        return lengths

    def _plan_pieces(self, layouts: Mapping[int, FileLayout]) -> list[_Piece]:
        """The fragments that this rank writes: what it alone holds, or an even share of what all hold."""
        degrees = self.engine.groups.degrees
        pieces = []
        for name, fragment in self.engine.fragments().items():
            first, last = 0, fragment.numel
            if self.engine.replicated:
                first, last = (fragment.numel * (degrees.data_rank + i) // degrees.data for i in (0, 1))
            part = self.parts[name]
            offset = layouts[part].offsets[name] + 4 * (fragment.start + first)
            for kind in KINDS if last > first else ():
                file = part_name(kind, degrees.tensor_rank, degrees.tensor, part)
                pieces.append(_Piece(kind, name, file, offset, first, last - first))
        return pieces


def surplus(checkpoints: list[Path], keep: int, keep_every: int) -> list[Path]:
    """Of checkpoints, oldest first, those to delete: neither the newest `keep` nor one each `keep_every` steps."""
    older = checkpoints[:-keep] if keep else []
    return [path for path in older if not keep_every or step_of(path) % keep_every]


def part_layouts(shapes: Mapping[str, torch.Size], parts: Mapping[str, int]) -> dict[int, FileLayout]:
    return {
        part: FileLayout({name: (torch.float32, shapes[name]) for name in shapes if parts[name] == part})
        for part in sorted(set(parts.values()))
    }


def _write_at(descriptor: int, data: memoryview, offset: int, size: int) -> int:
    """Write bytes at a place of a file of `size` bytes; returns their share of its checksum."""
    register, begin = 0, 0
    while begin < len(data):
        piece = data[begin : begin + PIECE_BYTES]
        written = os.pwrite(descriptor, piece, offset + begin)
        register = extend(register, piece[:written])
        begin += written
    return place(register, size - offset - len(data))


def write_extras(folder: Path, extras: Extras) -> dict[str, FileRecord]:
    files = {
        STATE: (json.dumps(extras.state, indent=1) + "\n").encode(),
        CONFIG: extras.config_yaml.encode(),
    }
    if extras.tokenizer:
        files[TOKENIZER] = extras.tokenizer
    for name, data in files.items():
        write_synced(folder / name, data)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in extras.probe.items()}
    with TensorFileWriter(folder / PROBE, layout) as writer:
        for name, tensor in extras.probe.items():
            writer.write(name, tensor)
    files[PROBE] = (folder / PROBE).read_bytes()
    return {name: FileRecord(len(data), zlib.crc32(data)) for name, data in files.items()}
