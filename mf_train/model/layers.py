"""The layers of a block as numbers: what the model is built of, and what counts, plans and groups go by.

This file needs no torch.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from mf_train.config.model import FfnKind, ModelConfig, NormKind
from mf_train.model.sums import MAX_CHUNKS, num_chunks


class ProductSizes(NamedTuple):
    """Of a product-key memory: n half keys, H heads, d features of a query, k values that each reads."""

    keys: int
    heads: int
    features: int
    reads: int

    @property
    def code_bytes(self) -> int:
        """Of the code of one of n^2 values: 4, of which 2 travel between ranks, or 8 beyond 2^16 values."""
        return 4 if self.keys**2 <= 2**16 else 8


@dataclass(frozen=True)
class Layer:
    """One layer, O features of I: K tables of 2^bits rows, a matrix, or two of rank r, also beside tables; a bias. Or a
    product-key memory.
    """

    name: str  # its module's in the block
    place: str  # what it reads, hashed or gathered once for all layers of one place
    kind: FfnKind
    in_features: int
    out_features: int
    num_tables: int
    bits: int
    rank: int  # 0: no matrices of low rank
    products: ProductSizes | None = None  # of a product-key memory alone

    @property
    def table_entries(self) -> int:
        """Numbers in tables."""
        if self.products:
            return self.products.keys**2 * self.out_features
        return self.num_tables * 2**self.bits * self.out_features

    @property
    def rows_read(self) -> int:
        """Rows of tables that a token reads."""
        return self.products.heads * self.products.reads if self.products else self.num_tables

    @property
    def matrix_entries(self) -> int:
        """Numbers in matrices, which are their multiply-adds a token too."""
        if self.kind == "dense":
            return self.in_features * self.out_features
        if self.products:  # of the queries, and half keys
            return self.products.heads * self.products.features * (self.in_features + self.products.keys)
        return self.rank * (self.in_features + self.out_features)

    @property
    def matrices(self) -> int:
        """The number of matrices."""
        return 1 if self.kind == "dense" else 2 * (self.rank > 0 or self.products is not None)

    @property
    def largest(self) -> int:
        """Numbers of its largest parameter."""
        if self.kind == "dense":
            return self.matrix_entries
        return max(self.table_entries, self.rank * max(self.in_features, self.out_features))

    @property
    def multiply_adds(self) -> int:
        """A token's, as the paper counts them: K O of a memory layer, and of the two of an FFN 3 K D together.

        A product-key memory's are those of its queries, its half keys and the values that are read.
        """
        width = 2 * self.in_features if self.name == "up" else self.out_features
        return self.rows_read * width + self.matrix_entries


@cache
def block_layers(config: ModelConfig) -> tuple[Layer, ...]:
    """The layers of every block, in the order in which they are used."""
    size, inner = config.hidden_size, config.inner_size
    found = []

    def add(place: str, kind: str, names: tuple[str, ...], in_features: int, out_features: int) -> None:
        if kind == "none":
            return
        tables = config.num_tables if kind == "memory" else 0
        bits = config.inner_bits if place == "inner" else config.bits
        rank = {"memory": config.residual_rank, "low_rank": config.rank or 0}.get(kind, 0)
        sizes = (config.product_keys, config.product_heads, config.product_query, config.product_reads)
        products = ProductSizes(*sizes) if kind == "product_key" else None
        for name in names:
            found.append(Layer(name, place, kind, in_features, out_features, tables, bits, rank, products))  # type: ignore[arg-type]

    add("attention", config.qkv_kind, ("query", "key", "value"), size, size)
    add("output", config.output_kind, ("output",), size, size)
    if config.ffn_kind == "product_key":
        add("ffn", config.ffn_kind, ("product_key",), size, size)
    else:
        add("ffn", config.ffn_kind, ("up",), size, inner)
        add("inner", config.ffn_kind, ("down",), inner, size)
    return tuple(found)


class Place(NamedTuple):
    """What layers of one place read: features that are hashed, or gathered from tensor-parallel ranks, once for all."""

    features: int
    hashed: bool
    bits: int
    gathered: bool


def block_places(config: ModelConfig) -> list[Place]:
    """The places of every block at which features are hashed or gathered."""
    found = {
        layer.place: Place(layer.in_features, layer.kind == "memory", layer.bits, layer.matrices > 0)
        for layer in block_layers(config)
    }
    return list(found.values())


def gathered_features(config: ModelConfig) -> int:
    """Features that tensor-parallel ranks gather for the matrices of a block: what these read at first."""
    return sum(place.features for place in block_places(config) if place.gathered)


def rank_features(config: ModelConfig) -> int:
    """Features between the matrices of low rank of a block, which ranks gather too."""
    return sum(layer.rank for layer in block_layers(config))


def hashed_features(config: ModelConfig) -> int:
    """Features that the hashes of a block read."""
    return sum(place.features for place in block_places(config) if place.hashed)


def rotated_features(config: ModelConfig) -> int:
    """Features of a block that learned rotations turn."""
    return hashed_features(config) if config.rotation else 0


def rotation_entries(config: ModelConfig) -> int:
    """Numbers in the rotations of a block, [K, tau, tau] at each place, which are their multiply-adds a token too."""
    places = [place for place in block_places(config) if place.hashed] if config.rotation else []
    return sum(place.features * place.bits for place in places)


def product_codes(config: ModelConfig) -> tuple[int, int]:
    """Values of a product-key memory that a token reads, and bytes of a value's code; zeros where there is none."""
    products = [layer.products for layer in block_layers(config) if layer.products]
    reads = sum(each.heads * each.reads for each in products)
    return reads, max((each.code_bytes for each in products), default=0)


def count_matrices(config: ModelConfig) -> int:
    """Matrices of a block."""
    return sum(layer.matrices for layer in block_layers(config))


def block_norms(config: ModelConfig) -> list[tuple[int, NormKind]]:
    """Features and kind of every norm of a block."""
    norms = [(config.hidden_size, config.norm)] * (3 if config.output_kind == "memory" else 2)
    return norms + [(config.inner_size, config.ffn_inner_norm)] * (config.ffn_kind == "memory")


def tensor_problem(config: ModelConfig, tensor: int, key: str) -> str:
    """Why so many tensor-parallel ranks cannot share a model, with `key`, which says how many; empty where they can."""
    if tensor < 1 or MAX_CHUNKS % tensor:
        return f"{key} is {tensor}: choose 1, 2, 4 or 8"
    parts = {"model.num_heads": config.num_heads, "model.vocab_size": config.vocab_size}
    if "memory" in config.layer_kinds:
        parts["the number of tables (model.hidden_size / model.bits)"] = config.num_tables
    if config.ffn_kind == "product_key":
        parts["model.product_heads"] = config.product_heads
    parts |= {"model.rank": config.rank or 0, "model.residual_rank": config.residual_rank}
    for name, value in parts.items():
        if value % tensor:
            return f"{key} {tensor} does not divide {name} {value}: choose a divisor"
    assert num_chunks(config.hidden_size) % tensor == 0 and num_chunks(config.inner_size) % tensor == 0
    return ""
