"""A product-key memory (Lample et al. 2019, arXiv 1907.05242; at scale: Berges et al. 2024, arXiv 2412.09764)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.model.attention.linear import wide
from mf_train.model.layers import ProductSizes
from mf_train.model.matrix import Matrix

_EPSILON = 1e-5  # added to a query's variance


class ProductKeys(nn.Module):
    """The k values that each head's query matches best: gathered features [..., D] -> codes and weights [..., H k].

    A value's key is a pair of n half keys, and there are n^2 pairs. A query q of d features, normalised to mean 0 and
    variance 1, is cut into halves. For each half the k of its n half keys with the largest products are found, and of
    their k^2 pairs the k with the largest sums, which are the k best of all n^2. The weights are their softmax.
    (The paper normalises queries over a batch, by which a token would depend on later ones; here each by itself.)

    Codes are int32 up to 2^16 values, else int64. Scores and softmax are computed in float32 at least. Tensor
    parallelism splits the heads, and replaces this module by one that also sends codes and weights to the other ranks.
    """

    def __init__(self, in_features: int, sizes: ProductSizes) -> None:
        super().__init__()
        self.reads = sizes.reads
        self.code_dtype = torch.int32 if sizes.code_bytes == 4 else torch.int64
        self.queries = Matrix(in_features, sizes.heads * sizes.features, bias=False)
        self.keys = nn.Parameter(torch.empty(sizes.heads, 2, sizes.keys, sizes.features // 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads, _, n, half = self.keys.shape
        q, keys = wide(self.queries(x), self.keys)
        q = F.layer_norm(q.unflatten(-1, (heads, 2 * half)), (2 * half,), eps=_EPSILON)
        scores = torch.einsum("...hpd,hpnd->...hpn", q.unflatten(-1, (2, half)), keys)
        best, place = scores.topk(self.reads)
        sums = best[..., 0, :, None] + best[..., 1, None, :]
        top, pair = sums.flatten(-2).topk(self.reads)
        first = place[..., 0, :].gather(-1, pair // self.reads)
        second = place[..., 1, :].gather(-1, pair % self.reads)
        codes = (first * n + second).to(self.code_dtype)
        return codes.flatten(-2), top.softmax(-1).flatten(-2).to(x.dtype)


class Values(nn.Module):
    """Codes and weights [..., R] -> the weighted sum of so many of the rows of one table, and a bias, [..., O].

    The table has a dimension of 1 before rows and columns, as if it were one of K: it is split, held and written so.
    """

    def __init__(self, rows: int, features: int) -> None:
        super().__init__()
        self.tables = nn.Parameter(torch.empty(1, rows, features))
        self.bias = nn.Parameter(torch.empty(features))

    def forward(self, codes: Tensor, weights: Tensor) -> Tensor:
        return weighted_rows(codes, weights, self.tables[0]) + self.bias


class ProductKey(nn.Module):
    """The whole FFN: gathered features [..., D] -> [..., O]."""

    def __init__(self, in_features: int, out_features: int, sizes: ProductSizes) -> None:
        super().__init__()
        self.select = ProductKeys(in_features, sizes)
        self.values = Values(sizes.keys**2, out_features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.values(*self.select(x))
        return y


def weighted_rows(codes: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """Sums of rows [N, O] by codes and weights [..., R] -> [..., O], in the rows' dtype."""
    bags, shares = codes.reshape(-1, codes.shape[-1]), weights.reshape(-1, codes.shape[-1]).to(rows.dtype)
    y = F.embedding_bag(bags, rows, per_sample_weights=shares, mode="sum")
    return y.view(*codes.shape[:-1], rows.shape[-1])
