"""Sliding-window attention: softmax over the last positions (Longformer: Beltagy et al. 2020, arXiv 2004.05150)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Attention, State


class WindowAttention(Attention):
    """Position i attends by softmax to positions i - w + 1 to i, w being `model.attention_window`.

    Computed in blocks of w queries, each of which reads the 2 w keys of its own block and of the one before: time and
    memory are S x 2 w. The state is the last w - 1 keys and values, and whether each is a token or padding.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.window = config.attention_window

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        batch, length = q.shape[0], q.shape[2]
        tokens = q.new_ones(batch, length, dtype=torch.bool) if padding is None else padding.bool()
        whole = padding is None and state is None
        if state is not None:
            k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
            tokens = torch.cat((state[2], tokens), 1)
        if length > self.window:
            y = _in_blocks(q, k, v, tokens, self.window)
        elif whole:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            past = k.shape[2] - length
            mask = band(length, past, self.window, q.device) & tokens[:, None, None]
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | _itself(length, past, q.device))
        kept = min(self.window - 1, k.shape[2])
        first = k.shape[2] - kept
        return y, (k[:, :, first:].contiguous(), v[:, :, first:].contiguous(), tokens[:, first:])


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, tokens_bt: Tensor, window: int) -> Tensor:
    """[B, H, S, head] of queries and [B, H, T, head] of keys and values, the last S of them the queries' own."""
    batch, heads, length, size = q.shape
    blocks = -(-length // window)
    after = blocks * window - length
    before = window - (k.shape[2] - length)  # so that one block of earlier keys comes first
    q = F.pad(q, (0, 0, 0, after)).view(batch, heads, blocks, window, size)
    k, v = (
        _with_previous(F.pad(x, (0, 0, before, after)).view(batch, heads, blocks + 1, window, size))
        for x in (k, v)
    )
    tokens = _with_previous(F.pad(tokens_bt, (before, after)).view(batch, 1, blocks + 1, window, 1))
    mask = band(window, window, window, q.device) & tokens.transpose(-1, -2)
    mask = (mask | _itself(window, window, q.device)).transpose(1, 2).flatten(0, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(0, (batch, blocks))
    return y.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _with_previous(x: Tensor) -> Tensor:
    """Each block behind the one before it: [B, H, N + 1, w, C] -> [B, H, N, 2 w, C]."""
    return torch.cat((x[:, :, :-1], x[:, :, 1:]), dim=3)


def band(length: int, past: int, window: int, device: torch.device) -> Tensor:
    """Which of past + length keys each of `length` queries has in its window: boolean [length, past + length]."""
    ones = torch.ones(length, past + length, dtype=torch.bool, device=device)
    return ones.tril(past) & ones.triu(past - window + 1)


def _itself(length: int, past: int, device: torch.device) -> Tensor:
    """A query's own key, which padding attends to as well, so that no softmax is empty."""
    return torch.eye(length, past + length, dtype=torch.bool, device=device).roll(past, -1)
