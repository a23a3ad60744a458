"""Counts what a GPU would be given to do: every torch operation that computes, and every launch of a Triton kernel.

Tensors are on the meta device, which has shapes and no numbers, so sizes may be real ones and nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mf_train.kernels import ops, triton_backend, triton_norm

_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OPERATORS = {
    f"mf_train::{name}": getattr(ops, name)
    for name in ("hash_codes", "hash_codes_backward", "lookup", "lookup_backward")
}


class Launches(TorchDispatchMode):
    """Within it: how often each operation or kernel is launched, and the bytes of tensors that launches read and write.

    A tensor that a launch is given counts once for it, without expanded dimensions. Views and empty tensors are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def total(self) -> int:
        return self.counts.total()

    def add(self, name: str, tensors: Iterable[Tensor]) -> None:
        self.counts[name] += 1
        self.bytes += sum(_bytes(tensor) for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _OPERATORS:  # what it does inside
            with self:
                return _OPERATORS[name]._init_fn(*args, **kwargs)
        result = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = name.removeprefix("aten::")
        is_view = not func._schema.is_mutable and {_storage(t) for t in made} <= {_storage(t) for t in given}
        if made and not is_view and name not in _EMPTY:
            self.add(name, [*given, *(t for t in made if not any(t is other for other in given))])
        return result


def _bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Triton kernels are chosen for every tensor, and counted in place of being launched."""
    found = Launches()

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        found.add(kernel.fn.__name__, tensors)

    monkeypatch.setattr(triton.JITFunction, "run", run)
    monkeypatch.setattr(ops, "find_backend", lambda *_: triton_backend)
    monkeypatch.setattr("mf_train.model.norm.fast_norm", lambda _: triton_norm)
    return found
