"""Softmax attention: every query weighs all keys up to its own (Vaswani et al. 2017, arXiv 1706.03762)."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.model.attention.base import Attention, Context, attend_in_documents


class SoftmaxAttention(Attention):
    """softmax(q k^T / sqrt(head)) v. The cache holds all keys and values.

    The context's mask, where there is one, says all of what a query attends to; without one attention is causal.
    """

    def attend_within(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        mask = context.mask
        if context.cache is not None:
            k, v = context.cache.update(k, v, self.layer)
        if mask is None and context.documents is not None:
            return attend_in_documents(_causal, q, k, v, context.documents)
        if context.attentions is not None:
            context.attentions.append(attention_weights(q, k, mask))
            return (context.attentions[-1] @ v).transpose(1, 2).flatten(-2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return y.transpose(1, 2).flatten(-2)


_causal = partial(F.scaled_dot_product_attention, is_causal=True)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(head)), in float32 and rounded: [B, H, S, head] and [B, H, T, head] -> [B, H, S, T]."""
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    if mask is None:
        mask = torch.ones(length, past + length, dtype=torch.bool, device=q.device).tril(past)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask.dtype == torch.bool:  # a row that attends to nothing gets equal weights and no NaN
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask
    return scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
