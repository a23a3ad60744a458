"""What each kind of attention costs, from the configuration alone: products, numbers moved, numbers kept."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mf_train.config.model import CHUNK, HASH_SAMPLE, ModelConfig


@dataclass(frozen=True)
class AttentionCost:
    """Of one token in one block, all heads together. Numbers are of the activations' dtype, sums of float32."""

    multiply_adds: (
        float  # of the forward pass's products, whole squares included, as the paper's Table 1 counts
    )
    computed: float  # of these, by a device
    passes: float  # forward and backward pass, in forward passes
    numbers: float  # read and written, in both passes
    sums: float = 0.0
    forward: float = 1 / 3  # share of what is moved
    # for the backward pass, beside q, k, v, the result and a normaliser a head
    kept_numbers: float = 0.0
    kept_sums: float = 0.0
    launches: float = 12  # of kernels, in both passes


def attention_costs(config: ModelConfig, sequence_length: int | None = None) -> list[AttentionCost]:
    """Of each block at a sequence length (default: the configuration's)."""
    length = sequence_length or config.sequence_length
    return [COSTS[kind](config, length) for kind in config.attention_kinds]


def _softmax(config: ModelConfig, length: int) -> AttentionCost:
    """2 products with S x S matrices, of which kernels compute the half below the diagonal, and 5 backward (Dao 2023,
    arXiv 2307.08691). q, k, v and the result, forward; these, their gradients and the rotation's copies, backward: 12
    passes.
    """
    products = 2 * length * config.hidden_size
    return AttentionCost(products, products / 2, 7 / 2, 12 * config.hidden_size)


def _window(config: ModelConfig, length: int) -> AttentionCost:
    """2 products with the 2 w keys of two blocks, the last block filled up; whole rows where they are no longer than w.

    Beside softmax's passes blocks of q, k, v and the result are copied, k and v twice as wide.
    """
    window, size = config.attention_window, config.hidden_size
    if length <= window:
        return _softmax(config, length)
    filled = -(-length // window) * window / length
    products = 4 * window * size * filled
    return AttentionCost(
        products, products, 7 / 2, (12 + 3 * 24) * size, kept_numbers=6 * size * filled, launches=60
    )


def _linear(config: ModelConfig, length: int, features: int, columns: int) -> float:
    """Multiply-adds of `linear.causal_sums`: products in each chunk, and those with the running matrix."""
    heads, chunk = config.num_heads, mean_chunk(length)
    return heads * (chunk * (features + columns) + 2 * features * columns)


def _launches(length: int) -> float:
    return 60 + 40 * -(-length // CHUNK)


def mean_chunk(length: int) -> float:
    """Length of the chunk that a position is in, on average."""
    whole, rest = divmod(length, CHUNK)
    return (whole * CHUNK**2 + rest**2) / length


def _states(config: ModelConfig, length: int, features: int, columns: int) -> float:
    """Numbers of the running matrices that are kept, one a chunk, for each token."""
    return config.num_heads * features * columns * -(-length // CHUNK) / length


def _of_sums(
    config: ModelConfig, length: int, products: float, *, sums: float, kept_sums: float
) -> AttentionCost:
    """Of a kind that `linear.causal_sums` computes once, with the `sums` that its forward pass reads and writes."""
    return AttentionCost(
        products,
        products,
        3,
        12 * config.hidden_size,
        sums=3 * sums,
        kept_sums=kept_sums,
        launches=_launches(length),
    )


# Passes over features, inputs and chunks' squares are counted from the operations, and tripled for the backward pass.


def _performer(config: ModelConfig, length: int) -> AttentionCost:
    size, heads, features = config.hidden_size, config.num_heads, config.random_features
    columns, squares = config.head_size + 1, heads * mean_chunk(length)
    products = 2 * features * size + _linear(config, length, features, columns)
    wide = heads * features
    return _of_sums(
        config,
        length,
        products,
        sums=22 * wide + 20 * size + 9 * squares,
        kept_sums=4 * wide + 3 * size + 2 * squares + _states(config, length, features, columns),
    )


def _cosformer(config: ModelConfig, length: int) -> AttentionCost:
    size, features, columns = config.hidden_size, 2 * config.head_size, config.head_size + 1
    products, squares = _linear(config, length, features, columns), config.num_heads * mean_chunk(length)
    return _of_sums(
        config,
        length,
        products,
        sums=45 * size + 4 * squares,
        kept_sums=8 * size + squares + _states(config, length, features, columns),
    )


def _flow(config: ModelConfig, length: int) -> AttentionCost:
    size, features = config.hidden_size, config.head_size
    products, squares = _linear(config, length, features, features), config.num_heads * mean_chunk(length)
    return _of_sums(
        config,
        length,
        products,
        sums=65 * size + 4 * squares,
        kept_sums=15 * size + squares + _states(config, length, features, features),
    )


def _linformer(config: ModelConfig, length: int) -> AttentionCost:
    """2 products of each segment with its own keys and all earlier summaries, and the summaries; kernels compute all.

    Beside softmax's passes segments are copied, with the summaries in each.
    """
    size, c, rank = config.hidden_size, config.attention_segment, config.attention_rank
    segments, finished = -(-length // c), length // c
    queries = length if segments == 1 else segments * c
    keys = c + (segments - 1) * rank
    products = 2 * size * (queries * keys + rank * finished * c) / length
    copied = 2 * size * (segments * keys + finished * c) / length
    filled = 0 if segments * c == length else size
    return AttentionCost(
        products,
        products,
        7 / 2,
        12 * size + 3 * (2 * copied + 4 * size),
        kept_numbers=copied + filled + queries * (3 * size + keys) / length,
        launches=80,
    )


def _luna(config: ModelConfig, length: int) -> AttentionCost:
    """The mean of float32, whose k and v are kept anyway, and of bfloat16, whose float32 copies are kept beside."""
    size, head, slots = config.hidden_size, config.head_size, config.attention_slots
    squares, packs = config.num_heads * mean_chunk(length), config.num_heads * slots
    products = slots * size + _linear(config, length, head, slots) + _linear(config, length, slots, head)
    return AttentionCost(
        products,
        products,
        3,
        12 * size,
        sums=3 * (8 * squares + 20 * size + 30 * packs),
        kept_sums=2 * squares + 2 * size + 5 * packs + 2 * _states(config, length, head, slots),
        launches=2 * _launches(length),
    )


def _luna_filtered(config: ModelConfig, length: int) -> AttentionCost:
    """Luna's, and what is filtered: read and written for each of the filter's weights."""
    size, luna = config.hidden_size, _luna(config, length)
    packs, width = config.num_heads * config.attention_slots, config.attention_filter
    return replace(
        luna,
        sums=luna.sums + 3 * (6 * width * size + 8 * packs),
        kept_numbers=2 * size,
        kept_sums=luna.kept_sums + size + 2 * packs,
        launches=luna.launches + 20 * width,
    )


def _ecoformer(config: ModelConfig, length: int) -> AttentionCost:
    """Also the hash's own loss, over a sample of the row. Kept: see Luna."""
    size, heads, squares = config.hidden_size, config.num_heads, config.num_heads * mean_chunk(length)
    bits, anchors, columns = config.attention_bits, config.attention_anchors, config.head_size + 1
    sample = 0 if length == 1 else -(-length // -(-length // HASH_SAMPLE))
    hash_ = 2 * (anchors * size + heads * (anchors + 1) * bits)
    taught = sample * hash_ + sample**2 * (size + heads * bits)
    products = hash_ + _linear(config, length, bits + 1, columns) + taught / length
    taught_kept = sample * (2 * size + heads * (4 * bits + 4 * anchors)) + heads * sample**2
    return AttentionCost(
        products,
        products,
        3,
        12 * size,
        sums=3 * (30 * size + 4 * squares + 2 * heads * (8 * anchors + 6 * bits)),
        kept_sums=squares + 4 * size + heads * (2 * anchors + 3 * bits) + taught_kept / length,
        launches=_launches(length) + 120,
    )


COSTS: dict[str, Callable[[ModelConfig, int], AttentionCost]] = {
    "softmax": _softmax,
    "window": _window,
    "performer": _performer,
    "cosformer": _cosformer,
    "flow": _flow,
    "linformer": _linformer,
    "luna": _luna,
    "luna_filtered": _luna_filtered,
    "ecoformer": _ecoformer,
}
