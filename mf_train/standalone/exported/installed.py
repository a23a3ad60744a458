"""Where this package is installed, a converted model computes with its C++ and Triton operations, else with torch's.

A converted model's folder relies on `mf_train.standalone.decoding.INTERFACE` being the number below, and then on that
module's `FastPath` and on `hash_codes`, `lookup`, `lookup_all`, `lookup_int8`, `fast_norm`, `fast_loss` and
`fast_rotary` of `mf_train.kernels`. With another number, of an older or a newer installation, it uses nothing of it.
"""

import importlib
from functools import cache
from typing import Any

INTERFACE = 2


@cache
def decoding() -> Any:
    """The module `mf_train.standalone.decoding`, or None."""
    try:
        found = importlib.import_module("mf_train.standalone.decoding")
    except ImportError:
        return None
    return found if getattr(found, "INTERFACE", None) == INTERFACE else None


@cache
def kernels() -> Any:
    """The module `mf_train.kernels`, or None."""
    return None if decoding() is None else importlib.import_module("mf_train.kernels")
