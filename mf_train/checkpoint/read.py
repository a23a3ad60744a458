"""Reading any region of any parameter from a checkpoint, whatever degrees wrote it."""

import json
import math
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mf_train.checkpoint.checksum import crc_of_file, crc_of_piece
from mf_train.checkpoint.layout import (
    AVERAGE,
    KINDS,
    MANIFEST,
    STATE,
    DamageError,
    Manifest,
    format_of,
    list_checkpoints,
    part_name,
    read_manifest,
)
from mf_train.checkpoint.safetensors_file import Region, TensorFile, bytes_of
from mf_train.model.sharding import ranks_of_span, slice_shape, split_dimension
from mf_train.run_folder import CHECKPOINTS, TOKENIZER_FILES

REMEDY = "use another checkpoint"


class CheckpointReader:
    """An open checkpoint. A read touches only the slices it needs; threads may read at the same time.

    `weights`: the kind that is read where none is named, which must be there: "master" or AVERAGE.

    Raises UserError (mostly DamageError) naming the file where one is missing, truncated or damaged, OSError where it
    cannot be read.
    """

    def __init__(self, checkpoint: Path, *, check_sizes: bool = True, weights: str = "master") -> None:
        self.checkpoint = checkpoint
        self.weights = weights
        self.manifest = read_manifest(checkpoint, check_sizes=check_sizes)
        self.shapes = {name: tuple(shape) for name, shape in self.manifest.parameters.items()}
        self._check_manifest()
        self._open: dict[str, TensorFile] = {}
        self._opening = threading.Lock()

    def close(self) -> None:
        """Let go of its files, whose space is then freed where they are deleted. A later read opens them again."""
        with self._opening:
            self._open.clear()

    def state(self) -> dict[str, Any]:
        """The training state beside the tensors."""
        try:
            state = json.loads(self.read_file(STATE))
        except (ValueError, RecursionError):
            state = None
        if not isinstance(state, dict):
            raise DamageError(self.checkpoint / STATE, "damaged (not a JSON object)")
        return state

    def read_tokenizer(self) -> dict[str, bytes]:
        """The files of its tokenizer by name, as `read_file` gives them; none where the run had only token ids."""
        return {name: self.read_file(name) for name in TOKENIZER_FILES if name in self.manifest.files}

    def read_file(self, name: str) -> bytes:
        """Contents of one of the small files, such as STATE, whose checksum is compared."""
        path = self.checkpoint / name
        record = self.manifest.files.get(name)
        if record is None:
            raise DamageError(path, f"not in {MANIFEST}")
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DamageError(path, "missing from the checkpoint") from None
        if (len(data), zlib.crc32(data)) != (record.size, record.crc32):
            raise DamageError(path, f"damaged (its checksum differs from {MANIFEST}'s)")
        return data

    def read(
        self,
        name: str,
        kind: str | None = None,
        region: Region | None = None,
        buffer: Tensor | None = None,
        checksums: "Checksums | None" = None,
    ) -> Tensor:
        """Float32 values of a region (slices with start and stop) of a parameter; the whole by default.

        A kind (one of KINDS) that the checkpoint does not hold is zero. With `buffer` (float32, flat, of twice the
        result's size), the result is a view of its front and no other memory is needed. With `checksums`, the region is
        one of whole rows (of consecutive elements in each of the checkpoint's slices), and what was read is added.
        """
        region = region or tuple(slice(0, size) for size in self.shapes[name])
        sizes = [part.stop - part.start for part in region]
        size = math.prod(sizes)
        values = torch.empty(size, dtype=torch.float32) if buffer is None else buffer[:size]
        spare = None if buffer is None else buffer[size:]
        self._read_into(values.view(sizes), name, kind or self.weights, region, spare, checksums)
        return values.view(sizes)

    def read_fragment(
        self, name: str, kind: str, tensor_rank: int, tensor_size: int, start: int, numel: int
    ) -> Tensor:
        """Flat elements [start, start + numel) of the slice that tensor-parallel rank `tensor_rank` would hold.

        Needs at most safetensors_file.SLAB_BYTES beside its result.
        """
        shape, split = slice_shape(name, self.shapes[name], tensor_size), split_dimension(name)
        values = torch.empty(numel, dtype=torch.float32)
        done = 0
        for box in _boxes(shape, start, start + numel):
            region, sizes = list(box), [part.stop - part.start for part in box]
            first = tensor_rank * shape[split]
            region[split] = slice(box[split].start + first, box[split].stop + first)
            size = math.prod(sizes)
            self._read_into(values[done : done + size].view(sizes), name, kind, tuple(region))
            done += size
        return values

    def rows(self, name: str, indices: Tensor) -> Tensor:
        """Rows float32 [n, last] of the weights of a parameter seen as [-1, last dimension]; `indices` int64 [n]."""
        shape, split = self.shapes[name], split_dimension(name)
        ranks, width = self.manifest.tensor_parallel, shape[-1]
        values = torch.empty(len(indices), width, dtype=torch.float32)
        if split == len(shape) - 1:
            for rank, part in enumerate(values.split(width // ranks, 1)):
                part.copy_(self._part(name, self.weights, rank).rows(name, indices))
            return values
        assert split == 0, name
        height = math.prod(shape[:-1]) // ranks
        for rank in (indices // height).unique().tolist():
            mine = (indices // height == rank).nonzero().flatten()
            values[mine] = self._part(name, self.weights, rank).rows(name, indices[mine] - rank * height)
        return values

    def _read_into(
        self,
        out: Tensor,
        name: str,
        kind: str,
        region: Region,
        spare: Tensor | None = None,
        checksums: "Checksums | None" = None,
    ) -> None:
        if kind not in self.manifest.kinds:
            assert kind in KINDS, kind
            out.zero_()
            return
        if not out.numel():
            return
        shape, split = self.shapes[name], split_dimension(name)
        width = shape[split] // self.manifest.tensor_parallel
        for rank, first, last in ranks_of_span(region[split], width):
            local = list(region)
            local[split] = slice(first - rank * width, last - rank * width)
            part = out.narrow(split, first - region[split].start, last - first)
            file = self._part(name, kind, rank)
            values = part
            if checksums is not None and not part.is_contiguous():
                spare = torch.empty(part.numel(), dtype=torch.float32) if spare is None else spare
                values = spare[: part.numel()].view(part.shape)
            file.read(name, tuple(local), values)
            if checksums is not None:
                checksums.add(file, name, tuple(local), values)
            if values is not part:
                part.copy_(values)

    def _part(self, name: str, kind: str, rank: int) -> TensorFile:
        """The file of a parameter's slice, which is there as the manifest says."""
        ranks = self.manifest.tensor_parallel
        file = part_name(kind, rank, ranks, self.manifest.parts[name])
        with self._opening:
            if file not in self._open:
                try:
                    self._open[file] = TensorFile(self.checkpoint / file, REMEDY)
                except FileNotFoundError:
                    raise DamageError(self.checkpoint / file, "missing from the checkpoint") from None
        found = self._open[file].tensors.get(name)
        expected = self.local_shape(name)
        if found is None or (found.dtype, found.shape) != (torch.float32, expected):
            held = "is missing" if found is None else f"is {found.dtype} {found.shape}"
            raise DamageError(
                self.checkpoint / file,
                f"damaged ({name} {held}, and by {MANIFEST} it is torch.float32 {expected})",
            )
        return self._open[file]

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Shape of each of the slices that the checkpoint holds of a parameter."""
        return slice_shape(name, self.shapes[name], self.manifest.tensor_parallel)

    def _check_manifest(self) -> None:
        """Check what the other methods rely on: its own checksum says nothing of a manifest made to harm."""
        manifest = self.manifest
        ranks = manifest.tensor_parallel
        sound = (
            type(manifest.step) is int
            and type(ranks) is int
            and ranks > 0
            and manifest.kinds in (KINDS, KINDS[:1], (*KINDS, AVERAGE))
            and manifest.format == format_of(manifest.kinds)
            and isinstance(manifest.parts, dict)
            and manifest.parts.keys() == self.shapes.keys()
            and all(type(part) is int and part >= 0 for part in manifest.parts.values())
            and all(type(size) is int and size > 0 for shape in self.shapes.values() for size in shape)
            and all(
                len(shape) > split_dimension(name) and shape[split_dimension(name)] % ranks == 0
                for name, shape in self.shapes.items()
            )
        )
        if not sound:
            raise DamageError(self.checkpoint / MANIFEST, "damaged")


def stream_state_before(run: Path, step: int) -> tuple[int, dict[str, Any]] | None:
    """Step and token stream's state of a run's newest checkpoint before `step`; None where there is none."""
    for checkpoint in reversed(list_checkpoints(run / CHECKPOINTS)):
        reader = CheckpointReader(checkpoint)
        if reader.manifest.step < step:
            state = reader.state()["stream"]
            return None if state is None else (reader.manifest.step, state)
    return None


class Checksums:
    """CRC-32 of part files, by threads, from what is read of them anyway; every tensor of a file once, in any order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._crcs: dict[TensorFile, int] = {}
        self._bytes: Counter[TensorFile] = Counter()

    def add(self, file: TensorFile, name: str, region: Region, values: Tensor) -> None:
        """Count `values`, a region of a tensor that lies in one piece in the file."""
        _, shape, offset = file.tensors[name]
        starts = [part.start for part in region]
        first = sum(start * math.prod(shape[index + 1 :]) for index, start in enumerate(starts))
        end = offset + first * values.itemsize + values.nbytes
        mine = crc_of_piece(bytes_of(values), file.size - end)
        with self._lock:
            self._crcs[file] = self._crcs.get(file, 0) ^ mine
            self._bytes[file] += values.nbytes

    def check(self, manifest: Manifest) -> None:
        """Raises DamageError naming the file whose bytes, header included, are not what the manifest says."""
        for file, crc in self._crcs.items():
            header = file.header()
            assert self._bytes[file] + len(header) == file.size, f"{file.path}: not read once"
            record = manifest.files.get(file.path.name)
            total = crc_of_file(crc ^ crc_of_piece(header, file.size - len(header)), file.size)
            if record is None or total != record.crc32:
                raise DamageError(file.path, f"damaged (its checksum differs from {MANIFEST}'s)")


def _boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Regions that cover flat elements [start, stop) of a tensor of `shape`, in order; at most 2 a dimension."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield (slice(start, stop),)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # inside one row
        yield from _within(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _within(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (slice(first, last), *(slice(0, size) for size in shape[1:]))
    if last * row < stop:
        yield from _within(shape, last, 0, stop - last * row)


def _within(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Region]:
    for box in _boxes(shape[1:], start, stop):
        yield (slice(index, index + 1), *box)
