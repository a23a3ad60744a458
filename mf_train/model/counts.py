"""Parameters and FLOPs of a model from its configuration alone, counted as the paper counts them."""

from dataclasses import dataclass
from functools import lru_cache

from mf_train.config.model import AttentionKind, ModelConfig
from mf_train.model.attention.costs import attention_costs
from mf_train.model.layers import block_layers, block_norms, rotation_entries

CHECKPOINT_BYTES = 12  # of a parameter: its float32 weight and both moments of AdamW


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by kind."""

    tables: int  # table entries of all memory layers
    dense: int  # matrices of the blocks, rotations among them
    embedding: int
    head: int
    attention: int  # what attention has of its own
    small: int  # norms and biases

    @property
    def total(self) -> int:
        return self.tables + self.dense + self.embedding + self.head + self.attention + self.small

    @property
    def checkpoint_bytes(self) -> int:
        return CHECKPOINT_BYTES * self.total


@lru_cache(maxsize=1024)  # plan asks for the same model's in each of its layouts
def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Exact number of parameters of the model that `MemoryFormer(config)` builds."""
    size = config.hidden_size

    def norm(features: int, kind: str) -> int:
        return features * (2 if kind == "layernorm" else 1)

    layers = block_layers(config)
    small = sum(norm(*each) for each in block_norms(config)) + (2 * size if config.qk_norm else 0)
    small += sum(layer.out_features for layer in layers)  # biases
    vocabulary = config.vocab_size * size
    return ParameterCounts(
        tables=sum(layer.table_entries for layer in layers) * config.num_layers,
        dense=(sum(layer.matrix_entries for layer in layers) + rotation_entries(config)) * config.num_layers,
        embedding=vocabulary,
        head=vocabulary,
        attention=sum(count_attention_parameters(config, kind) for kind in config.attention_kinds),
        small=small * config.num_layers + norm(size, config.norm),
    )


def count_attention_parameters(config: ModelConfig, kind: AttentionKind) -> int:
    """Of one block's attention, but for the gains of queries and keys."""
    if kind == "linformer":
        return 2 * config.num_heads * config.attention_rank * config.attention_segment
    if kind == "luna":
        return config.attention_slots * config.hidden_size
    if kind == "luna_filtered":  # a filter and two temperatures of each head
        return config.attention_slots * config.hidden_size + config.num_heads * (config.attention_filter + 2)
    if kind == "ecoformer":
        anchors, bits = config.attention_anchors, config.attention_bits
        return anchors * config.hidden_size + config.num_heads * bits * (anchors + 1)
    return 0


@dataclass(frozen=True)
class BlockFlops:
    """Multiply-adds of one block's forward pass over one sequence (one multiply-add = 1, as in Table 1)."""

    attention: float  # products with whole S x S matrices, or those of another kind; the mean of the blocks
    layers: int  # fully-connected layers, or the memory layers that replace them

    @property
    def total(self) -> float:
        return self.attention + self.layers


def count_block_flops(config: ModelConfig, sequence_length: int | None = None) -> BlockFlops:
    """FLOPs of a block at a sequence length (default: the configuration's).

    Attention 2 S^2 D, other kinds as in `attention.costs`; dense layers 12 S D^2; memory layers 6 K S D (section 3.3
    of the paper, which counts the two FFN lookups as 3 K S D together whatever e is); hybrids as their layers
    (`model.layers`). Norms are not counted, nor those of queries and keys.
    """
    s = sequence_length or config.sequence_length
    layers = s * (sum(layer.multiply_adds for layer in block_layers(config)) + rotation_entries(config))
    attention = s * sum(cost.multiply_adds for cost in attention_costs(config, s)) / config.num_layers
    return BlockFlops(attention=attention, layers=layers)
