"""Attention to summaries of what came before: Linformer (Wang et al. 2020, arXiv 2006.04768), made causal."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mf_train.config.model import ModelConfig
from mf_train.model.attention.base import Attention, State
from mf_train.model.attention.rows import attend_tokens_first, take


class LinformerAttention(Attention):
    """softmax(q [K_own; E K_1; ..; E K_g-1]^T / sqrt(head)) [V_own; F V_1; ..; F V_g-1] for a token of segment g.

    Eq. 7 of the paper projects a row's n keys and values to r by learned E and F [r, n], and is not causal. Here a row
    is cut into segments of c = `model.attention_segment` positions, all with the same E and F, [r, c] for each head. A
    token attends to the r summaries of each earlier segment, and in its own one to itself and what is before it, in one
    softmax. r is `model.attention_rank`. Time and memory are S (c + r S / c).

    Segments count from a row's first token. The state: summaries of keys and of values [B, H, N r, head], keys and
    values of the last segment [B, H, c, head], 0 behind its tokens, and the number of tokens [B]. Every call that is
    given a state waits for the device.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.rank, self.segment = config.attention_rank, config.attention_segment
        shape = config.num_heads, self.rank, self.segment
        self.key_summary = nn.Parameter(torch.empty(shape))
        self.value_summary = nn.Parameter(torch.empty(shape))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        return attend_tokens_first(self._attend_rows, q, k, v, padding, state)

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, state: State | None
    ) -> tuple[Tensor, State]:
        c, slots = self.segment, q.shape[2]
        if state is None:
            old_k, old_v, before = k[:, :, :0], v[:, :, :0], torch.zeros_like(lengths)
        else:
            old_k, old_v, last_k, last_v, before = state
            slots = max(int((before % c + lengths).max()), 1)
            # the tokens of a row's last segment, and right behind them the new ones
            slot, past = torch.arange(slots, device=q.device), (before % c)[:, None]
            place = torch.where(slot < past, slot, c + slot - past).clamp(max=c + q.shape[2] - 1)
            k, v = take(torch.cat((last_k, k), 2), place), take(torch.cat((last_v, v), 2), place)
        segments, finished = -(-slots // c), slots // c
        k, v = (F.pad(x, (0, 0, 0, segments * c - slots)) for x in (k, v))
        sums_k = torch.cat((old_k, self._summaries(self.key_summary, k, finished)), 2)
        sums_v = torch.cat((old_v, self._summaries(self.value_summary, v, finished)), 2)
        # a last segment that is finished has its summary for later calls
        read = old_k.shape[2] + (segments - 1) * self.rank
        sums = sums_k[:, :, :read], sums_v[:, :, :read]
        y = self._softmax(q, k, v, *sums, None if state is None else before)

        after = before + lengths
        if state is not None and finished:  # rows need not finish as many
            old, kept = old_k.shape[2] // self.rank, int((after // c).max())
            done, number = (before // c)[:, None], torch.arange(kept, device=q.device)
            index = torch.where(number < done, number, old + number - done).clamp(max=old + finished - 1)
            sums_k, sums_v = (self._take_summaries(x, index) for x in (sums_k, sums_v))
        filled, slot = (before % c + lengths)[:, None], torch.arange(c, device=q.device)
        last = (filled // c * c + slot).clamp(max=segments * c - 1)
        tokens = (slot < filled % c)[:, None, :, None]
        return y, (sums_k, sums_v, take(k, last) * tokens, take(v, last) * tokens, after)

    def _softmax(
        self, q: Tensor, k: Tensor, v: Tensor, sums_k: Tensor, sums_v: Tensor, before: Tensor | None
    ) -> Tensor:
        """y [B, H, S, head] of positions that follow `before` [B] tokens, or none in any row where that is None.

        k, v [B, H, G c, head] begin with the segment of the first of these positions. sums [B, H, N r, head]: of what
        is before that segment, with some at the end that mean nothing, and of all of k's segments but the last.
        """
        c, (_, heads, length, _), segments = self.segment, q.shape, k.shape[2] // self.segment
        start = torch.zeros(1, dtype=torch.long, device=q.device) if before is None else before
        past, done = (start % c)[:, None], (start // c)[:, None, None]
        if segments == 1:  # so that a token that is decoded is not a whole segment of queries
            at = (past + torch.arange(length, device=q.device)).unsqueeze(1)
        elif before is None:
            at = torch.arange(c, device=q.device)[None, None]
            q = F.pad(q, (0, 0, 0, segments * c - length))
        else:
            at = torch.arange(c, device=q.device)[None, None]
            place = torch.arange(segments * c, device=q.device) - past
            q = take(q, place.clamp(0, length - 1))
        # what a query attends to: [B or 1, G, queries, c] and [B or 1, G, N]
        own = torch.arange(c, device=q.device) <= at.unsqueeze(-1)
        number = torch.arange(sums_k.shape[2] // self.rank, device=q.device)
        new = number - (len(number) - (segments - 1))
        ready = torch.where(new < 0, number < done, new < torch.arange(segments, device=q.device)[:, None])
        ready = ready.repeat_interleave(self.rank, -1).unsqueeze(2)
        shape = len(start), segments, at.shape[-1]
        mask = torch.cat((own.expand(*shape, -1), ready.expand(*shape, -1)), -1)
        if before is not None:
            mask = mask.repeat_interleave(heads, 0)

        def beside(x: Tensor, sums: Tensor) -> Tensor:
            """Each segment's own rows and all summaries: [B H, G, c + N r, head]."""
            x = x.unflatten(2, (segments, c))
            return torch.cat((x, sums.unsqueeze(2).expand(-1, -1, segments, -1, -1)), 3).flatten(0, 1)

        y = F.scaled_dot_product_attention(
            q.unflatten(2, (segments, -1)).flatten(0, 1), beside(k, sums_k), beside(v, sums_v), attn_mask=mask
        )
        y = y.unflatten(0, (-1, heads)).flatten(2, 3)
        if segments == 1 or before is None:
            return y[:, :, :length]
        return take(y, (past + torch.arange(length, device=q.device)).clamp(max=segments * c - 1))

    def _summaries(self, weight: Tensor, x: Tensor, segments: int) -> Tensor:
        """r rows of each of the first segments: weight [H, r, c], x [B, H, T, head] -> [B, H, segments r, head]."""
        x = x[:, :, : segments * self.segment].unflatten(2, (segments, self.segment))
        return torch.einsum("hrc,bhgcd->bhgrd", weight, x).flatten(2, 3)

    def _take_summaries(self, sums: Tensor, index: Tensor) -> Tensor:
        """Of segments: sums [B, H, N r, head], index [B, M] -> [B, H, M r, head]."""
        whole = sums.unflatten(2, (-1, self.rank)).flatten(3)
        return take(whole, index).unflatten(3, (self.rank, -1)).flatten(2, 3)
