"""`transformers`' continuous batching: its paged cache as the plain model's; a converted model carries a copy of this
file.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

# What it gives to forward beside token ids, mask, positions and `logits_to_keep`; `cache` says that it is it.
_ARGUMENTS = (
    "block_table",
    "cache",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "logits_indices",
    "logits_processor_args",
    "max_length_k",
    "max_length_q",
    "read_index",
    "write_index",
)


def take_paged(others: MutableMapping[str, Any]) -> dict[str, Any] | None:
    """Take out of forward's other arguments those that say where the texts are; None where there is no `cache`."""
    if others.get("cache") is None:
        return None
    return {name: others.pop(name, None) for name in _ARGUMENTS}


class PagedCache:
    """Keys and values of many texts, in pages: new ones [1, H, S, head] lie one behind another in one row.

    `arguments` are those of `take_paged`, with `cache` a PagedAttentionCache, which says by them where each text's are.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values that the mask is of, [1, H, T, head]."""
        # a copy for each layer: the cache writes into it
        held: tuple[Tensor, Tensor] = self._arguments["cache"].update(
            key, value, layer, dict(self._arguments)
        )
        return held

    def get_seq_length(self) -> int:
        return 0  # positions and mask are given
