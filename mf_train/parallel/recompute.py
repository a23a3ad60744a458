"""Activations of a block computed again in its backward pass (`training.recompute: block`), applied from outside.

Between the passes a block keeps its input, and what it received from tensor-parallel ranks: the second forward pass
takes that from memory, so that no collective runs twice. Everything else is torch.utils.checkpoint's.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint, noop_context_fn

from mf_train.model import MemoryFormer
from mf_train.parallel.exchange import Exchange


def recompute_blocks(model: MemoryFormer, exchange: Exchange | None) -> None:
    """Have every block of a plain model (`exchange` None), or of a rank's part of one, keep its input alone.

    Same losses and gradients to the last bit. Names of modules and parameters do not change; hooks of a block run once,
    those of its modules in both forward passes.
    """
    for block in model.blocks:
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random
            context_fn=noop_context_fn if exchange is None else exchange.keep_and_repeat,
        )
