"""The Triton backend: the functions that the package's seam calls, for tensors on a GPU.

Deterministic, without a host's wait or a shape that depends on data: they run inside torch.compile (as part of
the custom operators) and in CUDA graphs, after one call outside has compiled them. With TRITON_INTERPRET=1 in the
environment when triton is first imported they run on CPU tensors, slowly, for tests.
"""

import triton

from .triton_hash import hash_codes, hash_codes_backward
from .triton_lookup import lookup, lookup_int8
from .triton_lookup_backward import lookup_backward
from .triton_sums import column_sums

__all__ = ["column_sums", "hash_codes", "hash_codes_backward", "lookup", "lookup_backward", "lookup_int8"]

OLDEST = (3, 3)  # the first with tuples in kernels and masked histograms

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
    raise ImportError(f"triton {triton.__version__} is installed, but these kernels need 3.3 or newer")
