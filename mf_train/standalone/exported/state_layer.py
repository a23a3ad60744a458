"""A layer of `transformers`' DynamicCache for attention that is no softmax; a converted model carries a copy of this
file.
"""

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from mf_train.model.attention.base import State


class StateLayer(CacheLayerMixin):
    """Holds what attention keeps of the earlier positions, tensors [B, ...], and how many positions those are.

    It cannot forget its last positions: `crop`, which assisted generation calls, raises ValueError.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.length = 0

    def keep(self, state: State, positions: int) -> None:
        """Hold `state`, that of so many positions more."""
        self.state, self.length, self.is_initialized = state, self.length + positions, True

    def lazy_initialization(self, *_: Any) -> None:
        raise ValueError("this layer's attention keeps a state in place of keys and values")

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("this layer's attention keeps a state in place of keys and values: call keep")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self, *_: Any) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        """Nothing: a state is small."""

    def prefetch(self) -> None:
        """Nothing: a state is small."""

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._replace(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                f"crop({tokens_to_remove}): this attention keeps a state, of which no position can be taken away: "
                "generate without an assistant and without prompt lookup"
            )

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._replace(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._replace(lambda tensor: tensor[indices])

    def _replace(self, function: Any) -> None:
        if self.state is not None:
            self.state = tuple(map(function, self.state))


class WithStates:
    """A DynamicCache some of whose layers are StateLayers, as the plain model's `StateCache`."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        held: tuple[Tensor, Tensor] = self._cache.update(key, value, layer)
        return held

    def get_seq_length(self) -> int:
        length: int = self._cache.get_seq_length()
        return length

    def state(self, layer: int) -> State | None:
        state: State | None = self._cache.layers[layer].state
        return state

    def keep(self, layer: int, state: State, positions: int) -> None:
        self._cache.layers[layer].keep(state, positions)
