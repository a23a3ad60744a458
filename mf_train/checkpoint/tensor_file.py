"""A safetensors file written tensor by tensor, so that its size is not bounded by memory.

Format: https://github.com/huggingface/safetensors, section "Format": eight bytes with the header's length, a JSON
header with each tensor's dtype, shape and offsets, then the data. Reading is the safetensors library's. The header is
padded with spaces so that the data begin at a multiple of 64 bytes, a cache line; tensors follow without gaps.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int16: "I16"}
_NAMES |= {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64"}
ALIGNMENT = 64


class Layout:
    """Where each tensor's data lie in a safetensors file of the tensors given (name: (dtype, shape)), in their order.

    `header` is the begin of the file, `offsets` the place of each tensor's first byte, `size` the file's, in bytes.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[torch.dtype, torch.Size | tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.tensors = dict(tensors)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        offset = 0
        for name, (dtype, shape) in tensors.items():
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + offset
        self.offsets = {
            name: len(self.header) + header[name]["data_offsets"][0]  # type: ignore[index]
            for name in tensors
        }


class TensorFileWriter:
    """Writes the tensors declared in `layout` (name: (dtype, shape)) into a new safetensors file.

    Each tensor arrives whole (`write`) or by parts of its flat data in order (`append`), in the layout's order.
    Leaving the `with` block without an error syncs the file to disk.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, torch.Size | tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.layout = Layout(layout, metadata)
        self.file = open(path, "wb")
        self.file.write(self.layout.header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the layout."""
        dtype, shape = self.layout.tensors[name]
        assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), (
            name,
            tensor.dtype,
            tensor.shape,
        )
        self.append(tensor)

    def append(self, part: Tensor) -> None:
        """Write the next part of the data, in row-major order."""
        data = part.detach().contiguous().cpu()
        self.file.write(data.view(-1).view(torch.uint8).numpy().data if data.numel() else b"")

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
                written = self.file.tell()
                size = self.layout.size
                assert written == size, f"{self.path}: wrote {written} of {size} bytes"
        finally:
            self.file.close()
