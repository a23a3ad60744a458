"""Reading any region of any parameter from a checkpoint, whatever degrees wrote it."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mf_train.checkpoint.layout import STATE, part_name, read_manifest
from mf_train.errors import UserError
from mf_train.model.initialise import split_dimension

Region = tuple[slice, ...]


class CheckpointReader:
    """An open checkpoint. Files are memory-mapped; a read touches only the slices it needs.

    Raises UserError naming the file where one is missing, truncated or damaged.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.manifest = read_manifest(checkpoint)
        self.shapes = {name: tuple(shape) for name, shape in self.manifest.parameters.items()}
        self._open: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """The training state beside the tensors."""
        state: dict[str, Any] = json.loads((self.checkpoint / STATE).read_text())
        return state

    def read(self, name: str, kind: str = "master", region: Region | None = None) -> Tensor:
        """Float32 values of a region (slices with start and stop) of a parameter; the whole by default."""
        shape = self.shapes[name]
        region = region or tuple(slice(0, size) for size in shape)
        split, ranks = split_dimension(name), self.manifest.tensor_parallel
        width = shape[split] // ranks
        begin, end = region[split].start, region[split].stop
        parts = []
        for rank in range(begin // width, -(-end // width)):
            local = list(region)
            local[split] = slice(max(begin - rank * width, 0), min(end - rank * width, width))
            parts.append(self._slice(name, kind, rank, tuple(local)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=split)

    def read_fragment(
        self, name: str, kind: str, tensor_rank: int, tensor_size: int, start: int, numel: int
    ) -> Tensor:
        """Flat elements [start, start + numel) of the slice that tensor-parallel rank `tensor_rank` would hold."""
        shape = list(self.shapes[name])
        split = split_dimension(name)
        shape[split] //= tensor_size
        row = torch.Size(shape[1:]).numel()
        first, last = start // row, -(-(start + numel) // row)
        region = [slice(0, size) for size in shape]
        region[0] = slice(first, last)
        offset = tensor_rank * shape[split]
        region[split] = slice(region[split].start + offset, region[split].stop + offset)
        flat = self.read(name, kind, tuple(region)).reshape(-1)
        return flat.narrow(0, start - first * row, numel)

    def _slice(self, name: str, kind: str, rank: int, region: Region) -> Tensor:
        file = part_name(kind, rank, self.manifest.tensor_parallel, self.manifest.parts[name])
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.checkpoint / file, framework="pt")
            values: Tensor = self._open[file].get_slice(name)[region]
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.checkpoint / file}: damaged ({error}); use another with checkpoint.resume=PATH"
            ) from None
        return values
