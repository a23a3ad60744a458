"""Causal attention with rotary embedding on the first part of each head, as in Pythia."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.kernels import fast_rotary
from mf_train.model.norm import HeadNorm

Rotary = tuple[Tensor, Tensor]
# of documents that lie one behind another, row by row; none reaches over a row's end
Lengths = tuple[int, ...]


class KeyValueCache(Protocol):
    """Keys and values of earlier positions, a layer at a time; `transformers`' caches fit."""

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append key and value [B, H, S, head] of a layer and return all of them, [B, H, T, head]."""

    def get_seq_length(self) -> int:
        """Positions held so far."""


def rotary_table(positions: Tensor, size: int, base: float) -> Rotary:
    """Cosine and sine of the rotary angles, float32: positions [S] or [B, S] -> [..., 1, S, size / 2].

    Angle of pair i at position p: p * base^(-2i / size) (RoFormer, arXiv 2104.09864, Eq. 15).
    """
    frequencies = base ** (
        -torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / max(size, 1)
    )
    angles = (positions.to(torch.float32).unsqueeze(-1) * frequencies).unsqueeze(-3)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate the first features of each head; pairs are (i, i + size / 2), as in GPT-NeoX. x: [B, H, S, head]."""
    cosine, sine = (part.to(x.dtype) for part in rotary)
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)


def rotate_both(q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and keys, in one kernel where there is one."""
    fast = fast_rotary(q)
    if fast is not None:
        turned_q, turned_k = fast.rotate(q, k, rotary)
        return turned_q, turned_k
    return rotate(q, rotary), rotate(k, rotary)


class Attention(nn.Module):
    """softmax(rope(q) rope(k)^T / sqrt(head)) v over whole heads: [B, S, H * head] three times -> the same shape.

    The number of heads follows from the input, so a rank that holds some of the heads runs the same code. It has no
    parameters but, with `model.qk_norm`, the gains of queries and keys, which are normalised before the rotation.
    `mask` is boolean (True: attend) or added to the scores, or the lengths of the documents inside which attention is
    causal; without one attention is causal in whole rows. `attentions` gets the softmax, [B, H, S, T].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        self.query_norm: HeadNorm | None = None
        self.key_norm: HeadNorm | None = None
        if config.qk_norm:
            sizes = config.hidden_size, config.head_size
            self.query_norm = HeadNorm(*sizes, config.norm_epsilon)
            self.key_norm = HeadNorm(*sizes, config.norm_epsilon)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary: Rotary,
        layer: int,
        mask: Tensor | Lengths | None = None,
        cache: KeyValueCache | None = None,
        attentions: list[Tensor] | None = None,
    ) -> Tensor:
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        q, k, v = (x.unflatten(-1, (-1, self.head_size)).transpose(1, 2) for x in (query, key, value))
        q, k = rotate_both(q, k, rotary)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        if isinstance(mask, tuple):
            return attend_in_documents(q, k, v, mask)
        if attentions is not None:
            attentions.append(attention_weights(q, k, mask))
            return (attentions[-1] @ v).transpose(1, 2).flatten(-2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return y.transpose(1, 2).flatten(-2)


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


def attend_in_documents(q: Tensor, k: Tensor, v: Tensor, lengths: Lengths) -> Tensor:
    """Causal attention in each document alone: [B, H, S, head] three times -> [B, S, H * head].

    A call for each document, so that what lies between documents is not computed; on GPUs too.
    """
    rows, _, length, _ = q.shape
    # one split of all tokens: its gradient is one concatenation, where slices would add up as many whole tensors
    parts = zip(*(x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (q, k, v)), strict=True)
    results = []
    for part in parts:
        q, k, v = (x_lhd.transpose(0, 1)[None] for x_lhd in part)
        results.append(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1))
    return torch.cat(results).view(rows, length, -1)


def causal_mask(
    length: int,
    past: int | Tensor,
    padding: Tensor | None,
    device: torch.device,
    total: int | None = None,
) -> Tensor | None:
    """Boolean mask [B or 1, 1, S, T] (True: attend) for S new positions after `past` ones, or None where plain
    causal attention or attention to everything says the same. padding [B, past + S]: 0 where a position is padding.

    With `total` there always is a mask, and its T is that: of keys that are not all there yet.
    """
    # a look at the padding would end a graph that is compiled
    padded = padding is not None and (torch.compiler.is_compiling() or not bool(padding.all()))
    if total is None:
        if not padded and (past == 0 or length == 1):
            return None
        total = int(past) + length
    query = (torch.arange(length, device=device) + past).unsqueeze(-1)
    key = torch.arange(total, device=device)
    mask = (key <= query)[None, None]
    if padding is None or not padded:
        return mask
    padding = F.pad(padding, (0, total - padding.shape[1]))
    attends = mask & padding[:, None, None, :].bool()
    # a query with nothing before it attends to itself, so that its softmax is not empty
    return attends | (~attends.any(-1, keepdim=True) & (key == query))


def unpadded_positions(padding: Tensor, length: int) -> Tensor:
    """Of the last `length` positions, counted from the first that is not padding: [B, T], 0 at padding -> [B, S]."""
    return (padding.long().cumsum(-1) - 1).clamp_(min=0)[:, -length:]


def document_numbers(token_ids: Tensor, end_of_text: int) -> Tensor:
    """The document of every position of packed rows, counted from 0 in each row: [B, S] -> int64 [B, S].

    An end of text belongs to the document that it ends.
    """
    ends = (token_ids == end_of_text).long()
    return ends.cumsum(-1) - ends


def document_positions(documents_bs: Tensor) -> Tensor:
    """Positions that begin at 0 in each document: numbers that never decrease along a row -> int64 [B, S]."""
    documents_bs = documents_bs.contiguous()
    starts = torch.searchsorted(documents_bs, documents_bs)  # the first place of an equal number
    return torch.arange(documents_bs.shape[-1], device=documents_bs.device) - starts


def document_lengths(documents_bs: Tensor) -> Lengths:
    """Lengths of all documents, row by row: numbers [B, S] that never decrease along a row -> integers, in all B S.

    Waits for the device.
    """
    starts = (document_positions(documents_bs).flatten() == 0).nonzero().flatten().tolist()
    return tuple(end - start for start, end in zip(starts, [*starts[1:], documents_bs.numel()], strict=True))


def document_mask(documents_bs: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the scores so that a token attends to itself and what is before it in its own document.

    [B, S] -> [B, 1, S, S] of 0 and minus infinity: what `document_lengths` says, where a compiler traces shapes that
    must not depend on the tokens.
    """
    length = documents_bs.shape[-1]
    attends = documents_bs[:, None, :, None] == documents_bs[:, None, None, :]
    attends &= torch.ones(length, length, dtype=torch.bool, device=documents_bs.device).tril()
    return torch.zeros(attends.shape, dtype=dtype, device=attends.device).masked_fill_(~attends, -torch.inf)
