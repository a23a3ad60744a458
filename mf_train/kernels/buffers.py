"""The addresses that C++ gets: of tensors that were checked to be what it takes them for."""

from collections.abc import Sequence

import torch
from torch import Tensor


def address(name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """Where the numbers of a tensor on the CPU begin: of `dtype` and `shape`, one behind another.

    Whoever hands the address over keeps the tensor alive. Raises ValueError, with `name`, for any other tensor.
    """
    if (
        tensor.dtype != dtype
        or tensor.shape != tuple(shape)
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or tensor.is_neg()  # its numbers are those in memory times -1
    ):
        raise ValueError(
            f"{name} must be {dtype} {tuple(shape)}, contiguous and on the CPU, got {tensor.dtype} "
            f"{tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return tensor.data_ptr()


def check(dtype: torch.dtype, shape: Sequence[int], **tensors: Tensor | None) -> None:
    """Raises ValueError for the first of these tensors whose address cannot be handed over; None is a null pointer."""
    for name, tensor in tensors.items():
        if tensor is not None:
            address(name, tensor, dtype, shape)


def check_chunks(columns: int, chunks: float) -> None:
    """Raises ValueError unless a row can be cut into so many chunks, for whose sums C++ has room."""
    if chunks not in (1, 2, 4, 8) or columns % chunks:
        raise ValueError(f"{columns} columns must be summed in 1, 2, 4 or 8 equal chunks, got {chunks}")
