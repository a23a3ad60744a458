"""The torch composition as custom operators, opaque to torch.compile, with explicit gradients.

Between forward and backward the hash keeps x, and the lookup keeps codes, weights and the tables argument
itself: no view or copy of it, because ZeRO stage 3 takes a parameter's storage away after the forward pass
and puts it back before the backward pass. Arguments were checked by the package's `hash_codes` and `lookup`.
"""

from typing import Any

import torch
from torch import Tensor

from . import composition


@torch.library.custom_op("mf_train::hash_codes", mutates_args=())
def hash_codes(x: Tensor, num_tables: int, temperature: float, score: str) -> tuple[Tensor, Tensor]:
    """Weights, then codes: `torch.library.opcheck` adds all outputs into the first, which has to be a float."""
    codes, weights = composition.hash_codes(x, num_tables, temperature, score)
    return weights, codes


@hash_codes.register_fake
def _(x: Tensor, num_tables: int, temperature: float, score: str) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], num_tables)
    dtype = composition.code_dtype(x.shape[-1] // num_tables)
    return x.new_empty(shape), x.new_empty(shape, dtype=dtype)


@torch.library.custom_op("mf_train::hash_codes_backward", mutates_args=())
def hash_codes_backward(
    d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str
) -> Tensor:
    return composition.hash_codes_backward(d_weights, x, num_tables, temperature, score)


@hash_codes_backward.register_fake
def _(d_weights: Tensor, x: Tensor, num_tables: int, temperature: float, score: str) -> Tensor:
    return x.new_empty(x.shape)


def _save_for_hash_codes(
    ctx: Any, inputs: tuple[Tensor, int, float, str], output: tuple[Tensor, Tensor]
) -> None:
    x, *ctx.settings = inputs
    ctx.save_for_backward(x)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the codes' gradient, which does not exist


def _hash_codes_gradients(ctx: Any, d_weights: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_weights is None:
        return None, None, None, None
    (x,) = ctx.saved_tensors
    return hash_codes_backward(d_weights, x, *ctx.settings), None, None, None


hash_codes.register_autograd(_hash_codes_gradients, setup_context=_save_for_hash_codes)


@torch.library.custom_op("mf_train::lookup", mutates_args=())
def lookup(codes: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    return composition.lookup(codes, weights, tables)


@lookup.register_fake
def _(codes: Tensor, weights: Tensor, tables: Tensor) -> Tensor:
    return tables.new_empty((*codes.shape[:-1], tables.shape[-1]))


@torch.library.custom_op("mf_train::lookup_backward", mutates_args=())
def lookup_backward(dy: Tensor, codes: Tensor, weights: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    return composition.lookup_backward(dy, codes, weights, tables)


@lookup_backward.register_fake
def _(dy: Tensor, codes: Tensor, weights: Tensor, tables: Tensor) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), tables.new_empty(tables.shape)


def _save_for_lookup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _lookup_gradients(ctx: Any, dy: Tensor) -> tuple[None, Tensor, Tensor]:
    return None, *lookup_backward(dy, *ctx.saved_tensors)


lookup.register_autograd(_lookup_gradients, setup_context=_save_for_lookup)
