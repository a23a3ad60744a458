"""Performer: softmax attention by positive random features (Choromanski et al. 2021, arXiv 2009.14794)."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Attention, State
from mf_train.model.attention.linear import causal_mean, wide

# added to a query's features, of which the largest is 1: no query gives all keys the weight 0
_EPSILON = 1e-6


class PerformerAttention(Attention):
    """exp(q . k / sqrt(head)) as a mean of products of features (FAVOR+, Lemma 1), in linear attention.

        phi(x)_f = exp(w_f . x - |x|^2 / 2),   x = q or k over head^(1/4)

    w_f are `model.attention_features` random vectors, orthogonal in blocks (section 2.4), drawn from
    `model.attention_seed` and the block's number; training draws them anew by setting `seed`. Before the exponential a
    query's largest exponent is taken off, and a key's, which is put back relative to the largest of the keys so far:
    both cancel in the quotient, and look at nothing later.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.seed, self.features = config.attention_seed, config.random_features

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        dtype = q.dtype
        q, k, v = wide(q, k, v)
        q, k = q * self.head_size**-0.25, k * self.head_size**-0.25
        w = random_features(self.seed, self.layer, self.features, self.head_size, q.device, q.dtype)
        of_q, of_k = q @ w, k @ w - k.square().sum(-1, keepdim=True) / 2
        scale = of_k.detach().amax(-1)
        q = (of_q - of_q.detach().amax(-1, keepdim=True)).exp() + _EPSILON
        k = (of_k - scale.unsqueeze(-1)).exp()
        if padding is not None:
            tokens = padding.bool()[:, None]
            k = k * tokens.unsqueeze(-1)
            scale = scale.masked_fill(~tokens, torch.finfo(scale.dtype).min)
        y, state = causal_mean(q, k, v, state, scale)
        return y.to(dtype), state


def random_features(
    seed: int, layer: int, count: int, size: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """[size, count] of `dtype`, a random vector in each column: standard normal, orthogonal to others of its block.

    A block is `size` columns, the last one the rest. Drawn in float64 on the CPU, so that all devices have the same.
    """
    return _drawn(seed, layer, count, size, device, dtype)


# torch.compiler.assume_constant_result, which would import the compiler: 155 MB, also where nothing is compiled
random_features._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=256)
def _drawn(seed: int, layer: int, count: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator("cpu").manual_seed(seed * 2**20 + layer)
        blocks = []
        for _ in range(math.ceil(count / size)):
            normal = torch.randn(2, size, size, generator=generator, dtype=torch.float64, device="cpu")
            directions, _ = torch.linalg.qr(normal[0])
            blocks.append(directions * normal[1].norm(dim=0))  # the lengths of independent normal vectors
        return torch.cat(blocks, dim=1)[:, :count].to(device, dtype)
