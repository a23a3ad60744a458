"""Makes Triton's interpreter quicker: it replaces the language's functions once, not at every call of a kernel.

To be imported where kernels run in the interpreter and nothing compiles them. Kernels that call others take half as
long.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class _Kept:
    def restore(self) -> None: ...


def patch_once(original: Callable[[Any], Any]) -> Callable[[Any], _Kept]:
    """In place of the interpreter's `original`, which patches what a function's module names of the language."""
    patched: set[frozenset[ModuleType]] = set()

    def patch(function: Any) -> _Kept:
        named = frozenset(
            value
            for value in function.__globals__.values()
            if inspect.ismodule(value) and value in (tl, tl.core)
        )
        if named not in patched:
            patched.add(named)
            original(function)
        return _Kept()

    return patch


interpreter._patch_lang = patch_once(interpreter._patch_lang)
