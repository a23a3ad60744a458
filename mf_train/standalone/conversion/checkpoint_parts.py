"""A checkpoint's part files, written offline: by threads, slice by slice, with their checksums."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mf_train.checkpoint.checksum import crc_of_file, crc_of_piece
from mf_train.checkpoint.layout import FileRecord, part_name
from mf_train.checkpoint.safetensors_file import Region, bytes_of
from mf_train.checkpoint.save import part_layouts
from mf_train.model.sharding import ranks_of_span, slice_shape, split_dimension
from mf_train.standalone.conversion.shard_writer import ShardWriter
from mf_train.standalone.conversion.weights import Shape, in_threads

Read = Callable[[str, str, Tensor], Iterator[tuple[Tensor, Region]]]


def write_parts(
    folder: Path,
    shapes: Mapping[str, Shape],
    parts: Mapping[str, int],
    ranks: int,
    kinds: Sequence[str],
    read: Read,
) -> dict[str, FileRecord]:
    """Write every parameter's slices of `ranks` tensor-parallel ranks; returns the files' records.

    `read(kind, name, buffer)` yields a parameter's float32 values in `whole_rows`, each with its region; `buffer` is
    that of `in_threads`. Raises OSError, and what `read` raises.
    """
    local = {name: torch.Size(slice_shape(name, shape, ranks)) for name, shape in shapes.items()}
    layouts = {
        part_name(kind, rank, ranks, part): layout
        for part, layout in part_layouts(local, parts).items()
        for rank in range(ranks)
        for kind in kinds
    }
    crcs = {
        file: crc_of_piece(layout.header, layout.size - len(layout.header))
        for file, layout in layouts.items()
    }
    lock = threading.Lock()
    with ShardWriter(folder, layouts) as writer:

        def copy(name: str, buffer: Tensor) -> None:
            for kind in kinds:
                places: Counter[int] = Counter()
                for values, region in read(kind, name, buffer):
                    for rank, data in _slices(
                        values, region[split_dimension(name)], name, shapes[name], ranks
                    ):
                        file = part_name(kind, rank, ranks, parts[name])
                        writer.write(file, name, places[rank], data)
                        places[rank] += len(data)
                        layout = layouts[file]
                        mine = crc_of_piece(data, layout.size - layout.offsets[name] - places[rank])
                        with lock:
                            crcs[file] ^= mine

        in_threads(shapes, copy)
    return {
        file: FileRecord(layout.size, crc_of_file(crcs[file], layout.size))
        for file, layout in layouts.items()
    }


def _slices(
    values: Tensor, span: slice, name: str, shape: Shape, ranks: int
) -> Iterator[tuple[int, memoryview]]:
    """Bytes of each rank's part of `values`, which covers `span` of the dimension that is split."""
    dimension = split_dimension(name)
    for rank, first, last in ranks_of_span(span, shape[dimension] // ranks):
        part = values.narrow(dimension, first - span.start, last - first)
        yield rank, bytes_of(part.contiguous())
