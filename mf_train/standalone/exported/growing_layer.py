"""`transformers`' DynamicCache with layers that grow in place; a converted model carries a copy of this file."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from mf_train.standalone.exported.cache import Growing
from mf_train.standalone.exported.state_layer import StateLayer


class GrowingLayer(DynamicLayer):
    """A DynamicLayer whose `keys` and `values` are views of buffers with room for more positions.

    All other operations of the class it extends assign tensors to `keys` and `values`, and work as they do there.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.growing_keys, self.growing_values = Growing(), Growing()
        super().__init__(*arguments, **options)

    @property
    def keys(self) -> Tensor | None:
        return self.growing_keys.held()

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self.growing_keys.hold(tensor)

    @property
    def values(self) -> Tensor | None:
        return self.growing_values.held()

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self.growing_values.hold(tensor)

    def lazy_initialization(self, key_states: Tensor, *_: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        return self.growing_keys.append(key_states), self.growing_values.append(value_states)

    def get_seq_length(self, *_: Any) -> int:
        return self.growing_keys.length


def check_cache(cache: Any, kinds: Sequence[str]) -> None:
    """Raises ValueError for a cache whose layers give anything but all positions, or that is another model's.

    `kinds`: of the attention of each of the model's layers. One that is no softmax has a StateLayer.
    """
    kind, layers = type(cache).__name__, len(kinds)
    found = getattr(cache, "layers", None)
    others = sorted(set(kinds) - {"softmax"})
    if others and type(cache) is not DynamicCache:
        raise ValueError(
            f"past_key_values is a {kind} and model.attention is {others[0]}, whose state it cannot hold: give a "
            "DynamicCache, or none for a new one"
        )
    if not isinstance(cache, Cache) or found is None or not all(map(_fits, found, kinds)):
        raise ValueError(
            f"past_key_values is a {kind}: give a DynamicCache or StaticCache, or none for a new one"
        )
    replicated = cache.layer_class_to_replicate
    if len(found) > layers or (len(found) < layers and not (replicated and _gives_all(replicated))):
        raise ValueError(
            f"past_key_values has {len(found)} layers and the model {layers}: give this model's cache"
        )
    if room_of(cache) is None and len(lengths := {each.get_seq_length() for each in found}) > 1:
        raise ValueError(f"past_key_values has layers of {sorted(lengths)} positions: give a whole cache")


def _fits(layer: Any, kind: str) -> bool:
    """Whether a cache's layer holds what attention of this kind keeps, or nothing yet."""
    if kind == "softmax":
        return _gives_all(type(layer))
    return isinstance(layer, StateLayer) or (type(layer) is DynamicLayer and not layer.get_seq_length())


def _gives_all(layer: Any) -> bool:
    return issubclass(layer, DynamicLayer | StaticLayer) and not layer.is_sliding


def room_of(cache: Any) -> int | None:
    """Positions that a static cache has room for, all of which its layers give; None for any other cache."""
    layer = cache.layers[0] if cache is not None and cache.layers else None
    return layer.max_cache_len if isinstance(layer, StaticLayer) else None


def grow_in_place(cache: Any, kinds: Sequence[str]) -> list[GrowingLayer] | None:
    """The layers of a DynamicCache, of which plain ones are replaced by growing ones; None for any other cache.

    A layer whose attention is no softmax gets a StateLayer, and the result is None.
    """
    if type(cache) is not DynamicCache:
        return None
    if len(cache.layers) < len(kinds) and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers += [DynamicLayer() for _ in range(len(kinds) - len(cache.layers))]
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = _growing(layer) if kinds[index] == "softmax" else StateLayer()
    if len(cache.layers) != len(kinds) or any(type(layer) is not GrowingLayer for layer in cache.layers):
        return None
    return cache.layers  # type: ignore[no-any-return]


def _growing(layer: Any) -> GrowingLayer:
    growing = GrowingLayer()
    if layer.is_initialized and layer.keys.dim() == 4:
        growing.lazy_initialization(layer.keys)
        growing.keys, growing.values = layer.keys, layer.values
    return growing
