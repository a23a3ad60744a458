"""The shape of a model: one typed section that the trainer, the converter and the converted model share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

Kind = Literal["memoryformer", "dense"]
Score = Literal["probability", "scaled_probability"]
NormKind = Literal["layernorm", "rmsnorm"]
Activation = Literal["none", "gelu", "relu"]
LayerKind = Literal["memory", "dense", "low_rank"]
FfnKind = Literal["memory", "dense", "low_rank", "product_key"]
OutputKind = Literal["none", "memory", "dense", "low_rank"]
AttentionKind = Literal[
    "softmax", "window", "performer", "cosformer", "flow", "linformer", "luna", "luna_filtered", "ecoformer"
]

# kinds of attention that have weights of their own
LEARNED_ATTENTION: tuple[AttentionKind, ...] = ("linformer", "luna", "luna_filtered", "ecoformer")
MAX_BITS = 16  # a code travels in at most two bytes
HASH_SAMPLE = 64  # positions of a row, at most, from which ecoformer's hash learns in a step
CHUNK = 128  # positions that linear attention takes at once


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of one model: MemoryFormer, its dense peer, or a hybrid of their layers.

    Symbols of the paper: `hidden_size` D, `num_layers` L, `num_heads` H, `bits` tau, `expand_bits` e,
    `temperature` t, `vocab_size` V, `sequence_length` S. The number of tables of a layer is K = D / tau.
    Models without memory layers ignore `bits`, `expand_bits`, `score` and `temperature`; those without memory layers in
    their FFN `ffn_inner_norm` and `ffn_activation`.

    Raises ValueError when a value is out of range or the sizes do not divide.
    """

    kind: Kind = "memoryformer"  # or its dense peer: what the three layers below are that are null
    qkv: LayerKind | None = None  # query, key and value: memory layers, matrices, or matrices of low rank
    # both layers of the FFN; those of matrices have 4 hidden_size features and GELU between. Or one product-key memory,
    # which is all of it
    ffn: FfnKind | None = None
    output: OutputKind | None = None  # between attention and residual; null: none, or the dense peer's matrix
    rank: int | None = None  # of low_rank layers: features between their two matrices
    # rank of two matrices beside the tables of each memory layer, which add to it; 0: none
    residual_rank: int = 0
    product_keys: int = 256  # n of product_key: half keys, whose n^2 pairs have a value each
    product_heads: int = 4  # H of product_key: queries of a token
    product_query: int = 128  # d of product_key: features of a query, half of them for each half key
    product_reads: int = 16  # k of product_key: values that a query reads
    rotation: bool = False  # each table's features are turned by a learned rotation before they are hashed
    hidden_size: int = 512  # D, features of a token
    num_layers: int = 6  # L, blocks
    num_heads: int = 8  # H, attention heads
    bits: int = 8  # tau, of a code: a table has 2^tau rows, and a layer D / tau tables
    expand_bits: int = 2  # e: tables of the second FFN layer have tau + e bits
    # a row's weight; scaled_probability: times the sum of |z|, as in the paper's released code
    score: Score = "probability"
    temperature: float = 1.0  # t of the weight: the larger, the softer
    norm: NormKind = "layernorm"  # before Q/K/V, before the FFN, before the head
    ffn_inner_norm: NormKind = "layernorm"  # between the two memory layers of the FFN (Norm3)
    ffn_activation: Activation = "none"  # between the two memory layers (Table 6's ablation)
    norm_epsilon: float = 1e-5  # added to the variance
    qk_norm: bool = False  # queries and keys are normalised head by head, before the rotary embedding
    logit_softcap: float = 0.0  # logits become cap tanh(logits / cap); 0: they stay as they are
    attention: AttentionKind = "softmax"  # how queries, keys and values become a result: docs/attention.md
    # of blocks, counted from 0, that keep softmax whatever `attention` is
    full_attention_layers: tuple[int, ...] = ()
    attention_window: int = 256  # w of window: positions that each attends to, its own among them
    # of performer: random features; 0: d ln d for heads of d features, rounded up
    attention_features: int = 0
    attention_seed: int = 0  # of performer's random features
    # steps after which performer's random features are drawn anew, each time from the next seed; 0: never
    attention_redraw: int = 0
    attention_segment: int = 256  # c of linformer: positions of a segment
    attention_rank: int = 32  # r of linformer: summaries of an earlier segment
    attention_slots: int = 16  # l of luna and luna_filtered: rows that all positions are packed into
    attention_filter: int = 4  # w of luna_filtered: positions that its convolution reads
    attention_bits: int = 16  # b of ecoformer: of the code of a query or key
    attention_anchors: int = 20  # m of ecoformer: points from which its hash measures distances
    rotary_fraction: float = 0.25  # of a head's features that are rotated
    rotary_base: float = 10000.0  # wavelengths grow up to 2 pi times this
    vocab_size: int = 50304  # V, tokens
    sequence_length: int = 2048  # S, tokens of a row that are predicted

    @property
    def head_size(self) -> int:
        """Features of one attention head, D / H."""
        return self.hidden_size // self.num_heads

    @property
    def qkv_kind(self) -> LayerKind:
        """What query, key and value are."""
        return self.qkv or self._standard_kind

    @property
    def ffn_kind(self) -> FfnKind:
        """What the FFN is: two layers of a kind, or a product-key memory."""
        return self.ffn or self._standard_kind

    @property
    def output_kind(self) -> OutputKind:
        """What the layer between attention and residual is."""
        return self.output or ("none" if self.kind == "memoryformer" else "dense")

    @property
    def _standard_kind(self) -> LayerKind:
        return "memory" if self.kind == "memoryformer" else "dense"

    @property
    def layer_kinds(self) -> set[str]:
        """The kinds of layers that a block has."""
        kinds: set[str] = {self.qkv_kind, self.ffn_kind, self.output_kind}
        return kinds - {"none"}

    @property
    def description(self) -> str:
        """`kind`, with the layers that are not those of the kind."""
        others: dict[str, str] = {
            name: value for name in _BY_KIND if (value := getattr(self, name)) is not None
        }
        if self.residual_rank:
            others["residual_rank"] = str(self.residual_rank)
        if self.rotation:
            others["rotation"] = "learned"
        return self.kind + "".join(f", {name} {value}" for name, value in others.items())

    @property
    def num_tables(self) -> int:
        """K, the number of tables of every memory layer: D / tau."""
        return self.hidden_size // self.bits

    @property
    def inner_bits(self) -> int:
        """tau', the bits of one table's code in the second FFN layer: tau + e."""
        return self.bits + self.expand_bits

    @property
    def inner_size(self) -> int:
        """Features between the two layers of the FFN: (tau + e) * K between memory layers, 4 D of matrices; else 0."""
        if self.ffn_kind == "product_key":
            return 0
        return self.inner_bits * self.num_tables if self.ffn_kind == "memory" else 4 * self.hidden_size

    @property
    def rotary_size(self) -> int:
        """Features of each head that are rotated; even."""
        return int(self.head_size * self.rotary_fraction) // 2 * 2

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        """The kind of attention of each block."""
        full = self.full_attention_layers
        return tuple("softmax" if i in full else self.attention for i in range(self.num_layers))

    @property
    def random_features(self) -> int:
        """Random features of a head, for the kinds of attention that have them."""
        size = self.head_size
        return self.attention_features or max(1, math.ceil(size * math.log(size)))

    def after(self, steps: int) -> ModelConfig:
        """The model's after so many steps of training: its random features are those of the last one."""
        if not self.attention_redraw:
            return self
        drawings = max(steps - 1, 0) // self.attention_redraw
        return replace(self, attention_seed=self.attention_seed + drawings)

    @property
    def has_attention_weights(self) -> bool:
        """Whether some block's attention has weights of its own (beside the gains of `qk_norm`)."""
        return self.attention in LEARNED_ATTENTION and len(self.full_attention_layers) < self.num_layers

    def __post_init__(self) -> None:
        # a list in the JSON of a converted model
        object.__setattr__(self, "full_attention_layers", tuple(self.full_attention_layers))
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed and not (value is None and name in _BY_KIND):
                raise ValueError(
                    f"model.{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}"
                )
        for name in (
            "hidden_size",
            "num_layers",
            "num_heads",
            "bits",
            "vocab_size",
            "sequence_length",
            "attention_window",
            "attention_segment",
            "attention_rank",
            "attention_slots",
            "attention_filter",
            "attention_bits",
            "attention_anchors",
            "product_keys",
            "product_heads",
            "product_query",
            "product_reads",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("temperature", "norm_epsilon", "rotary_base"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be a number above 0")
        if not 0 <= self.logit_softcap < math.inf:
            raise ValueError(
                f"model.logit_softcap is {self.logit_softcap}: it must be a number above 0, or 0 for none"
            )
        if not 0 <= self.rotary_fraction <= 1:
            raise ValueError(f"model.rotary_fraction is {self.rotary_fraction}: it must be between 0 and 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.num_heads {self.num_heads} does not divide model.hidden_size {self.hidden_size}: "
                "choose a divisor"
            )
        self._check_attention()
        if "memory" in self.layer_kinds:
            self._check_tables()
        self._check_ranks()
        if self.ffn_kind == "product_key":
            self._check_products()

    def _check_ranks(self) -> None:
        if not 0 <= self.residual_rank < self.hidden_size:
            raise ValueError(
                f"model.residual_rank is {self.residual_rank}: give a number up to model.hidden_size - 1 = "
                f"{self.hidden_size - 1}, or 0 for none"
            )
        if self.residual_rank and "memory" not in self.layer_kinds:
            raise ValueError(
                f"model.residual_rank is {self.residual_rank} and the model has no memory layers: leave it out"
            )
        if self.rotation and "memory" not in self.layer_kinds:
            raise ValueError("model.rotation is true and the model has no memory layers: leave it out")
        if "low_rank" not in self.layer_kinds:
            if self.rank is not None:
                raise ValueError(f"model.rank is {self.rank} and no layer is low_rank: leave it out")
        elif self.rank is None or not 1 <= self.rank < self.hidden_size:
            raise ValueError(
                f"model.rank is {'missing' if self.rank is None else self.rank} and layers are low_rank: give a number "
                f"from 1 to model.hidden_size - 1 = {self.hidden_size - 1}"
            )

    def _check_products(self) -> None:
        if self.product_query % 2:
            raise ValueError(
                f"model.product_query is {self.product_query}: it must be even, half of it for each half key"
            )
        if self.product_reads > self.product_keys:
            raise ValueError(
                f"model.product_reads {self.product_reads} is more than model.product_keys {self.product_keys}: lower "
                "one or raise the other"
            )

    def _check_attention(self) -> None:
        for name in ("attention_features", "attention_seed", "attention_redraw"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be 0 or more")
        layers = self.full_attention_layers
        outside = [layer for layer in layers if type(layer) is not int or not 0 <= layer < self.num_layers]
        if outside or len(set(layers)) < len(layers):
            raise ValueError(
                f"model.full_attention_layers is {list(layers)}: name blocks from 0 to {self.num_layers - 1}, "
                "each once"
            )
        if layers and self.attention == "softmax":
            raise ValueError(
                f"model.full_attention_layers is {list(layers)} and model.attention is softmax, which every block "
                "has: leave it out, or choose another model.attention"
            )
        if self.attention == "linformer" and self.attention_rank > self.attention_segment:
            raise ValueError(
                f"model.attention_rank {self.attention_rank} is more than model.attention_segment "
                f"{self.attention_segment}: a summary has fewer rows than its segment; lower one or raise the other"
            )
        if self.attention == "linformer" and self.attention_segment >= self.sequence_length:
            raise ValueError(
                f"model.attention_segment {self.attention_segment} is not below model.sequence_length "
                f"{self.sequence_length}: no earlier segment would be summarised; lower it, or let model.attention be "
                "softmax"
            )

    def _check_tables(self) -> None:
        if self.hidden_size % self.bits:
            raise ValueError(
                f"model.bits {self.bits} does not divide model.hidden_size {self.hidden_size}: "
                "a layer has hidden_size / bits tables"
            )
        if self.expand_bits < 0 or self.inner_bits > MAX_BITS:
            raise ValueError(
                f"model.bits {self.bits} + model.expand_bits {self.expand_bits} = {self.inner_bits}: "
                f"expand_bits must be 0 or more and the sum at most {MAX_BITS}"
            )


_BY_KIND = ("qkv", "ffn", "output")  # null where `kind` says it
_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(Kind),
    "qkv": get_args(LayerKind),
    "ffn": get_args(FfnKind),
    "output": get_args(OutputKind),
    "score": get_args(Score),
    "norm": get_args(NormKind),
    "ffn_inner_norm": get_args(NormKind),
    "ffn_activation": get_args(Activation),
    "attention": get_args(AttentionKind),
}
