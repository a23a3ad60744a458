"""One block, each of whose layers is a choice: MemoryFormer's (Eq. 13), those of its dense peer, and every hybrid."""

from collections.abc import Iterator

from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Context
from mf_train.model.attention.kinds import build_attention
from mf_train.model.layers import Layer, block_layers
from mf_train.model.matrix import Gather, LowRank, Matrix
from mf_train.model.memory import Hash, Lookup, lookup_each
from mf_train.model.norm import Norm
from mf_train.model.product_key import ProductKey
from mf_train.model.rotation import Rotation


class Block(nn.Module):
    """z = x + output(attention(q, k, v of Norm1 x)); y = z + down(inner(up(Norm2 z))). [B, S, D] both ways.

    `model.qkv`, `model.output` and `model.ffn` say what the layers are. MemoryFormer has memory layers, no output
    layer, and a norm inside the FFN. Matrices, whole or of low rank, are used as in Pythia, but with sequential
    residuals: GELU inside the FFN. A memory layer as output layer has a norm before it, as every other has. With
    `model.residual_rank` each memory layer has matrices of low rank beside its tables. With `model.rotation`
    what they hash is turned before. A product-key memory is the whole FFN.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.inputs: dict[str, list[str]] = {}  # the layers that read what is hashed or gathered at a place
        size, inner = config.hidden_size, config.inner_size
        # in this order: gradients are reduced, and their norm is summed, in that of the parameters
        self.norm_attention = Norm(size, config.norm, config.norm_epsilon)
        self._add_layers("attention", config)
        self.attention = build_attention(config, layer)
        self.norm_output: Norm | None = None
        if config.output_kind == "memory":
            self.norm_output = Norm(size, config.norm, config.norm_epsilon)
        self._add_layers("output", config)
        self.norm_ffn = Norm(size, config.norm, config.norm_epsilon)
        self._add_layers("ffn", config)
        self.activation = _ACTIVATIONS[config.ffn_activation if config.ffn_kind == "memory" else "gelu"]()
        self.norm_inner: Norm | None = None
        if config.ffn_kind == "memory":
            self.norm_inner = Norm(inner, config.ffn_inner_norm, config.norm_epsilon)
        self._add_layers("inner", config)

    def _add_layers(self, place: str, config: ModelConfig) -> None:
        layers = [layer for layer in block_layers(config) if layer.place == place]
        self.inputs[place] = [layer.name for layer in layers]
        for layer in layers[:1]:  # all are of one kind
            if layer.kind == "memory":
                if config.rotation:
                    self.add_module(f"rotate_{place}", Rotation(layer.num_tables, layer.bits))
                self.add_module(f"hash_{place}", Hash(layer.bits, config.temperature, config.score))
            if layer.matrices:
                self.add_module(f"gather_{place}", Gather())
        for layer in layers:
            self.add_module(layer.name, _build(layer))
            if layer.kind == "memory" and layer.rank:
                beside = LowRank(layer.in_features, layer.out_features, layer.rank, bias=False)
                self.add_module(f"{layer.name}_path", beside)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self._apply_layers("attention", self.norm_attention(x))
        y = self.attention(q, k, v, context)
        if self.inputs["output"]:
            (y,) = self._apply_layers("output", y if self.norm_output is None else self.norm_output(y))
        z = x + y
        (m,) = self._apply_layers("ffn", self.norm_ffn(z))
        if not self.inputs["inner"]:
            return z + m
        m = self.activation(m)
        (y,) = self._apply_layers("inner", m if self.norm_inner is None else self.norm_inner(m))
        return z + y

    def _apply_layers(self, place: str, x: Tensor) -> list[Tensor]:
        """What each layer of a place gives."""
        layers = [getattr(self, name) for name in self.inputs[place]]
        if f"hash_{place}" not in self._modules:
            gathered = getattr(self, f"gather_{place}")(x)
            return [layer(gathered) for layer in layers]
        turned = getattr(self, f"rotate_{place}")(x) if f"rotate_{place}" in self._modules else x
        codes, weights = getattr(self, f"hash_{place}")(turned)
        # a module that is called runs its hooks, which time it
        ys = lookup_each(codes, weights, layers) if len(layers) > 1 else [layers[0](codes, weights)]
        if f"gather_{place}" in self._modules:
            gathered = getattr(self, f"gather_{place}")(x)
            paths = [getattr(self, f"{name}_path") for name in self.inputs[place]]
            ys = [y + path(gathered) for y, path in zip(ys, paths, strict=True)]
        return ys

    def memory_layers(self) -> Iterator[tuple[Hash, list[Lookup]]]:
        """Each hash with the lookups that read its codes."""
        for place, names in self.inputs.items():
            if f"hash_{place}" in self._modules:
                yield getattr(self, f"hash_{place}"), [getattr(self, name) for name in names]


def _build(layer: Layer) -> nn.Module:
    if layer.kind == "memory":
        return Lookup(layer.num_tables, layer.bits, layer.out_features)
    if layer.kind == "low_rank":
        return LowRank(layer.in_features, layer.out_features, layer.rank)
    if layer.products:
        return ProductKey(layer.in_features, layer.out_features, layer.products)
    return Matrix(layer.in_features, layer.out_features)


_ACTIVATIONS: dict[str, type[nn.Module]] = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}
