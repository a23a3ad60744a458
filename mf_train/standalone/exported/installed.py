"""Where this package is installed, a converted model computes with its C++ and Triton operations, else with torch's.

A converted model's folder relies on `mf_train.standalone.decoding.INTERFACE` being the number below, and then on that
module's `FastPath` and on `hash_codes`, `lookup`, `lookup_all`, `lookup_int8`, `fast_norm`, `fast_loss` and
`fast_rotary` of `mf_train.kernels`. With another number, of an older or a newer installation, it uses nothing of it.
"""

import importlib
from typing import Any

INTERFACE = 3


def find_decoding() -> Any:
    """The module `mf_train.standalone.decoding`, or None."""
    try:
        found = importlib.import_module("mf_train.standalone.decoding")
    except ImportError:
        return None
    return found if getattr(found, "INTERFACE", None) == INTERFACE else None


# found once and held as plain names, through which torch.compile can look
DECODING: Any = find_decoding()
KERNELS: Any = None if DECODING is None else importlib.import_module("mf_train.kernels")
