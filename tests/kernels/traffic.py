"""Launches and bytes of what runs: torch's operations, and Triton's kernels in its interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

_MAKES_ROOM = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Traffic(TorchDispatchMode):
    """`launches` holds the bytes of each operation that moves any, in their order.

    An operation of torch reads its tensors and writes its results, each once; of what is broadcast, and of what it
    gathers from or scatters into, what it touches. A kernel of Triton moves what its loads and stores name, masked
    ones left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[int] = []
        self.in_kernel = False

    @property
    def bytes(self) -> int:
        return sum(self.launches)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.in_kernel or name in _MAKES_ROOM:  # the interpreter copies what a kernel is given
            return result
        given = _tensors((args, kwargs))
        made = _tensors(result)
        written = [t for t in made if name.endswith("_") or not _shares(t, given)]
        if written:
            self.launches.append(_bytes(name, given, written))
        return result

    @contextmanager
    def kernel(self) -> Iterator[None]:
        self.launches.append(0)
        self.in_kernel = True
        try:
            yield
        finally:
            self.in_kernel = False

    def add(self, mask: Any, pointers: Any) -> None:
        self.launches[-1] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _shares(tensor: Tensor, others: list[Tensor]) -> bool:
    """A view of one of the others."""
    place = tensor.untyped_storage().data_ptr()
    return any(place == other.untyped_storage().data_ptr() for other in others)


def _size(tensor: Tensor) -> int:
    """Bytes of its different elements."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count


def _bytes(name: str, given: list[Tensor], written: list[Tensor]) -> int:
    if name == "gather":
        return _size(given[1]) + 2 * _size(written[0])
    if name == "scatter_add_":
        return _size(given[1]) + 3 * _size(given[2])
    reads = [] if name in ("zero_", "fill_") else given
    if name == "copy_":
        reads = given[1:]
    return sum(map(_size, [*reads, *written]))


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Counts what runs inside, on this thread: forward passes, and backward passes on the CPU."""
    builder, run = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    with Traffic() as traffic:

        def counted_run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with traffic.kernel():
                return run(self, *args, **kwargs)

        def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            traffic.add(mask, pointers)
            return load(self, pointers, mask, *rest)

        def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            traffic.add(mask, pointers)
            return store(self, pointers, value, mask, *rest)

        interpreter.GridExecutor.__call__ = counted_run
        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        try:
            yield traffic
        finally:
            interpreter.GridExecutor.__call__ = run
            builder.create_masked_load, builder.create_masked_store = load, store
