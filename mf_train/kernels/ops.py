"""Hash and lookup as custom operators with explicit gradients, opaque to torch.compile; each call runs one backend.

Between forward and backward the hash keeps x, and the lookup keeps codes, weights and the tables arguments
themselves: no view or copy of them, because ZeRO stage 3 takes a parameter's storage away after the forward pass
and puts it back before the backward pass. Arguments were checked by the package's `hash_codes` and `lookup_all`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .backends import find_backend
from .composition import code_dtype


class GradientSum(Protocol):
    """Where the gradients of a parameter are added up, as its attribute `gradient_sum`.

    If every set of tables of a lookup has one, the backward pass adds to them itself; the tables get no `.grad`.
    """

    def begin(self) -> tuple[Tensor, bool]:
        """The sums, float32 in the parameter's shape; whether to add to what they hold, or to overwrite it."""

    def done(self) -> None:
        """This backward pass has added the parameter's gradient, all of it."""


@torch.library.custom_op("mf_train::hash_codes", mutates_args=())
def hash_codes(
    x: Tensor, num_tables: int, temperature: float, score: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Weights, then codes: `torch.library.opcheck` adds all outputs into the first, which has to be a float."""
    codes, weights = find_backend(backend, x).hash_codes(x, num_tables, temperature, score)
    return weights, codes


@hash_codes.register_fake
def _(x: Tensor, num_tables: int, temperature: float, score: str, backend: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], num_tables)
    return x.new_empty(shape), x.new_empty(shape, dtype=code_dtype(x.shape[-1] // num_tables))


@torch.library.custom_op("mf_train::hash_codes_backward", mutates_args=())
def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str, backend: str
) -> Tensor:
    dx: Tensor = find_backend(backend, x).hash_codes_backward(d_weights, x, num_tables, temperature, score)
    return dx


@hash_codes_backward.register_fake
def _(d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_hash_codes(
    ctx: Any, inputs: tuple[Tensor, int, float, str, str], output: tuple[Tensor, Tensor]
) -> None:
    x, *ctx.settings = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the codes' gradient, which does not exist


def _hash_codes_gradients(ctx: Any, d_weights: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_weights is None:
        return None, None, None, None, None
    (x,) = ctx.saved_tensors
    return hash_codes_backward(d_weights, x, *ctx.settings), None, None, None, None


hash_codes.register_autograd(_hash_codes_gradients, setup_context=_save_for_hash_codes)


@torch.library.custom_op("mf_train::lookup", mutates_args=())
def lookup(
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    biases: Sequence[Tensor],
    chunks: int,
    backend: str,
) -> list[Tensor]:
    """`biases`: one for each set, or none at all. `chunks` matters to the backward pass alone."""
    ys: list[Tensor] = find_backend(backend, tables[0], weights).lookup(codes, weights, tables, biases)
    return ys


@lookup.register_fake
def _(
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    biases: Sequence[Tensor],
    chunks: int,
    backend: str,
) -> list[Tensor]:
    return [table.new_empty((*codes.shape[:-1], table.shape[-1])) for table in tables]


@torch.library.custom_op("mf_train::lookup_backward", mutates_args=())
def lookup_backward(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    dtype: torch.dtype,
    has_biases: bool,
    chunks: int,
    backend: str,
) -> list[Tensor]:
    """The gradient of the weights, of type `dtype`, those of the tables, and those of the biases if there are any."""
    return _gradients(dys, codes, weights, tables, dtype, has_biases, chunks, backend)


def _gradients(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    dtype: torch.dtype,
    has_biases: bool,
    chunks: int,
    backend: str,
    sums: Sequence[tuple[Tensor, bool]] | None = None,
) -> list[Tensor]:
    """As `lookup_backward`; with `sums` the tables' are added there and not returned."""
    chosen = find_backend(backend, tables[0], weights)
    d_weights, d_tables = chosen.lookup_backward(dys, codes, weights, tables, chunks, sums)
    d_biases = [chosen.column_sums(dy).to(dy.dtype) for dy in dys] if has_biases else []
    return [d_weights.to(dtype), *d_tables, *d_biases]


@lookup_backward.register_fake
def _(
    dys: Sequence[Tensor],
    codes: Tensor,
    weights: Tensor,
    tables: Sequence[Tensor],
    dtype: torch.dtype,
    has_biases: bool,
    chunks: int,
    backend: str,
) -> list[Tensor]:
    d_biases = [dy.new_empty(dy.shape[-1:]) for dy in dys] if has_biases else []
    d_tables = [table.new_empty(table.shape) for table in tables]
    return [weights.new_empty(weights.shape, dtype=dtype), *d_tables, *d_biases]


def _save_for_lookup(
    ctx: Any,
    inputs: tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], int, str],
    output: list[Tensor],
) -> None:
    codes, weights, tables, biases, ctx.chunks, ctx.backend = inputs
    ctx.dtype, ctx.has_biases = weights.dtype, len(biases) > 0
    sums = [getattr(table, "gradient_sum", None) for table in tables]
    ctx.sums = None if None in sums else sums
    if (
        weights.element_size() > tables[0].element_size()
    ):  # every backend rounds them first: no more of them is kept
        weights = weights.to(tables[0].dtype)
    ctx.save_for_backward(codes, weights, *tables)


def _lookup_gradients(ctx: Any, dys: list[Tensor | None]) -> tuple[Any, ...]:
    codes, weights, *tables = ctx.saved_tensors
    full = [
        table.new_zeros((*codes.shape[:-1], table.shape[-1])) if dy is None else dy
        for dy, table in zip(dys, tables, strict=True)
    ]
    given = full, codes, weights, tables, ctx.dtype, ctx.has_biases, ctx.chunks, ctx.backend
    if ctx.sums is None:
        d_weights, *rest = lookup_backward(*given)
        return None, d_weights, rest[: len(tables)], rest[len(tables) :], None, None
    d_weights, *d_biases = _gradients(*given, [one.begin() for one in ctx.sums])
    for one in ctx.sums:
        one.done()
    return None, d_weights, [None] * len(tables), d_biases, None, None


lookup.register_autograd(_lookup_gradients, setup_context=_save_for_lookup)
