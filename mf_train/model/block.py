"""One block: MemoryFormer's (Eq. 13) and that of its dense peer (Pythia's, with sequential residuals)."""

import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Context
from mf_train.model.attention.kinds import build_attention
from mf_train.model.memory import Hash, Lookup, lookup_each
from mf_train.model.norm import Norm


class MemoryFormerBlock(nn.Module):
    """z = x + Attention(hash(Norm1 x)); y = z + lookup2(hash(Norm3(lookup1(hash(Norm2 z))))). [B, S, D] both ways."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        size, tables, bits = config.hidden_size, config.num_tables, config.bits
        self.norm_attention = Norm(size, config.norm, config.norm_epsilon)
        self.hash_attention = Hash(bits, config.temperature, config.score)
        self.query = Lookup(tables, bits, size)
        self.key = Lookup(tables, bits, size)
        self.value = Lookup(tables, bits, size)
        self.attention = build_attention(config, layer)
        self.norm_ffn = Norm(size, config.norm, config.norm_epsilon)
        self.hash_ffn = Hash(bits, config.temperature, config.score)
        self.up = Lookup(tables, bits, config.inner_size)
        self.activation = _ACTIVATIONS[config.ffn_activation]()
        self.norm_inner = Norm(config.inner_size, config.ffn_inner_norm, config.norm_epsilon)
        self.hash_inner = Hash(config.inner_bits, config.temperature, config.score)
        self.down = Lookup(tables, config.inner_bits, size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        codes, weights = self.hash_attention(self.norm_attention(x))
        q, k, v = lookup_each(codes, weights, (self.query, self.key, self.value))
        z = x + self.attention(q, k, v, context)
        m = self.activation(self.up(*self.hash_ffn(self.norm_ffn(z))))
        return z + self.down(*self.hash_inner(self.norm_inner(m)))


class DenseBlock(nn.Module):
    """z = x + W_o Attention(W_q h, W_k h, W_v h), h = Norm1 x; y = z + W_2 gelu(W_1 Norm2 z), 4 D inside."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        size = config.hidden_size
        self.norm_attention = Norm(size, config.norm, config.norm_epsilon)
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.attention = build_attention(config, layer)
        self.output = nn.Linear(size, size)
        self.norm_ffn = Norm(size, config.norm, config.norm_epsilon)
        self.up = nn.Linear(size, 4 * size)
        self.down = nn.Linear(4 * size, size)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = self.norm_attention(x)
        q, k, v = self.query(h), self.key(h), self.value(h)
        z = x + self.output(self.attention(q, k, v, context))
        return z + self.down(F.gelu(self.up(self.norm_ffn(z))))


_ACTIVATIONS: dict[str, type[nn.Module]] = {"none": nn.Identity, "gelu": nn.GELU, "relu": nn.ReLU}
